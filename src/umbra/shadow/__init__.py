"""The shadow network: its backbone and initial weights, pretrained shadows, input scales, and its draft vocabulary."""
