"""The shadow network: its layers, initial weights, pretrained shadows, and the scale of its inputs."""
