"""Write one ONNX graph for prompts and for decoding, with keys and values as inputs and outputs; in fp32, and quantised.

A classifier has no cache: input_ids (B, T), attention_mask (B, T) → logits (B, C). A language model:

    input_ids (B, T), attention_mask (B, P + T), position_ids (B, T), logits_to_keep (R)   past.{l}.{key,value} (B, H, P, D)
    → logits (B, R, V), present.{l}.{key,value} (B, H, P + T, D)

transformers traces the model and fuses it for onnxruntime on a CPU. Embeddings and head that share a weight are stored once,
quantised too: the embeddings are looked up in the blocks by which the head multiplies.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
# The packages of the extra `onnx` are optional.

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.exporters import OnnxConfig, OnnxExporter

from umbra.deploy.export.quiet import quiet
from umbra.errors import ExportError, raising

BLOCK = 32  # number of weights that share a scale
BITS = {"int8": 8, "int4": 4}
MICROSOFT = "com.microsoft"  # domain of onnxruntime's own operators
BATCH, PAST, NEW = 2, 3, 2  # sizes for tracing: 0 and 1 would become constants


def write_onnx(model: PreTrainedModel, folder: Path, quantizations: list[str]) -> list[Path]:
    """Write ``model-{fp32,int8,int4}.onnx``, each with its weights in a second file.

    Args:
        model: a stock model.
        folder: where the files are written.
        quantizations: which of the three.

    Returns:
        The files, in the order of ``quantizations``.

    Raises:
        ExportError: the model cannot be traced or quantised, or its cache is not keys and values of every token.
    """
    architecture, vocabulary = model.config.model_type, model.config.get_text_config().vocab_size
    files = [folder / f"model-{name}.onnx" for name in quantizations]
    with quiet():
        plain = _trace(model, vocabulary) if model.can_generate() else _trace_classifier(model, vocabulary)
        with raising(ExportError, lambda e: f"onnxruntime cannot quantise a {architecture}: {e!s:.500}"):
            protos = {name: _quantised(plain, BITS[name], vocabulary) for name in quantizations if name in BITS}
        protos["fp32"] = plain
        for name, file in zip(quantizations, files, strict=True):
            weights = file.with_name(f"{file.name}.data")
            onnx.save_model(protos[name], str(file), save_as_external_data=True, location=weights.name)
    return files


# -- tracing -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _trace(model: PreTrainedModel, vocabulary: int) -> Any:
    """The fp32 graph, as a ModelProto."""
    architecture, parameters = model.config.model_type, inspect.signature(model.forward).parameters
    ids = torch.arange(BATCH * (PAST + NEW)).reshape(BATCH, -1) % vocabulary
    cache = DynamicCache()
    with raising(ExportError, lambda error: f"transformers cannot trace a {architecture} for ONNX: {error!s:.500}"):
        model(input_ids=ids[:, :PAST], past_key_values=cache, use_cache=True)
        if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ExportError(
                f"The ONNX graph caches keys and values of every token; a {architecture} has other states. Use --to hf."
            )
        sample: dict[str, Any] = {
            "input_ids": ids[:, PAST:],
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(PAST, PAST + NEW).expand(BATCH, NEW),
        }
        sample = {k: v for k, v in sample.items() if k in parameters} | {"past_key_values": cache, "use_cache": True}
        exported = OnnxExporter().export(model, sample, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    _rename(exported.program.graph)
    proto = onnx_ir.to_proto(exported.program)
    del proto.graph.value_info[:]  # it has the old names of sizes
    for node in proto.graph.node:
        node.name = node.name or node.output[0]
    _add_rows_input(proto.graph, vocabulary)
    return proto


@torch.no_grad()
def _trace_classifier(model: PreTrainedModel, vocabulary: int) -> Any:
    """The fp32 graph of a classifier, which reads a whole text at once."""
    ids = 3 + torch.arange(BATCH * (PAST + NEW)).reshape(BATCH, -1) % (vocabulary - 3)
    sample: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        sample["use_cache"] = False
    with raising(ExportError, lambda e: f"transformers cannot trace a {model.config.model_type} for ONNX: {e!s:.500}"):
        exported = OnnxExporter().export(model, sample, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    for value in exported.program.graph.inputs:
        value.shape = onnx_ir.Shape(["batch", "length"])
    proto = onnx_ir.to_proto(exported.program)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        node.name = node.name or node.output[0]
    return proto


def _rename(graph: Any) -> None:
    """Give inputs, outputs and their sizes plain names."""
    sizes = {
        "input_ids": ("batch", "new"),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "new"),
    }
    for value in [*graph.inputs, *graph.outputs]:
        if match := re.fullmatch(r"(?:(input|output)\.)?past_key_values\.layers\.(\d+)\.(key|value)s", value.name):
            side, layer, part = match.groups()
            value.name = f"{'present' if side == 'output' else 'past'}.{layer}.{part}"
            heads, width = (int(str(value.shape[i])) for i in (1, 3))
            value.shape = onnx_ir.Shape(["batch", heads, "total" if side == "output" else "past", width])
        elif value.name == "logits":
            value.shape = onnx_ir.Shape(["batch", "new", value.shape[2]])
        elif value.name in sizes:
            value.shape = onnx_ir.Shape(sizes[value.name])


def _add_rows_input(graph: Any, vocabulary: int) -> None:
    """Add an input `logits_to_keep` (R): the states at which the head, much of a small model's work, is computed."""
    head = next((n for n in reversed(graph.node) if _is_head(n, graph, vocabulary)), None)
    if head is None:
        return
    selection = helper.make_node(
        "Gather", [head.input[0], "logits_to_keep"], ["states_to_keep"], name="states_to_keep", axis=1
    )
    graph.node.insert(list(graph.node).index(head), selection)
    head.input[0] = selection.output[0]
    graph.input.append(helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, ["rows"]))
    logits = next(o for o in graph.output if o.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "rows"


def _is_head(node: Any, graph: Any, vocabulary: int) -> bool:
    """Whether a node multiplies by a (D, V) matrix, or by the transpose of a (V, D) one."""
    if node.op_type not in ("MatMul", "FusedMatMul"):
        return False
    shape = next((list(t.dims) for t in graph.initializer if t.name == node.input[1]), [])
    return len(shape) == 2 and shape[node.op_type == "MatMul"] == vocabulary


# -- quantising --------------------------------------------------------------------------------------------------------


def _quantised(plain: Any, bits: int, vocabulary: int) -> Any:
    """A copy with linear layers quantised by blocks of their inputs; embeddings and head always to 8 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    proto: Any = onnx.ModelProto()
    proto.CopyFrom(plain)
    _make_products(proto.graph)
    heads, gather = _heads(proto.graph, vocabulary)
    for width, excluded in ((bits, heads), (8, [])):
        tool: Any = MatMulNBitsQuantizer(
            proto, bits=width, block_size=BLOCK, is_symmetric=width == 8, accuracy_level=4, nodes_to_exclude=excluded
        )
        tool.process()
        proto = tool.model.model
    if gather is not None:
        _look_up_in_blocks(proto.graph, gather)
    used = {name for node in proto.graph.node for name in node.input}
    remaining = [t for t in proto.graph.initializer if t.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(remaining)
    return proto


def _make_products(graph: Any) -> None:
    """Replace each Gemm with a constant weight by a product and a sum, which the quantiser supports."""
    weights, nodes = {t.name: t for t in graph.initializer}, []
    for node in graph.node:
        attributes = {"alpha": 1.0, "beta": 1.0, **{a.name: helper.get_attribute_value(a) for a in node.attribute}}
        weight = node.input[1] if node.op_type == "Gemm" else ""
        if weight not in weights or attributes.get("transA") or (attributes["alpha"], attributes["beta"]) != (1, 1):
            nodes.append(node)
            continue
        if attributes.get("transB"):
            transposed = numpy_helper.to_array(weights[weight]).T.copy()
            weight = f"{weight}.turned"
            graph.initializer.append(numpy_helper.from_array(transposed, weight))
        product = f"{node.output[0]}.product" if len(node.input) > 2 else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=product))
        if len(node.input) > 2:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=node.name))
    del graph.node[:]
    graph.node.extend(nodes)


def _heads(graph: Any, vocabulary: int) -> tuple[list[str], Any]:
    """Names of the products with a (D, V) matrix; and the embedding lookup, if its table is among these matrices.

    A head that is tied to the table becomes such a product. Without one, a product whose result is unused is added, so that the
    quantiser processes the table.
    """
    weights = {t.name: t for t in graph.initializer}
    heads = [n.name for n in graph.node if n.op_type == "MatMul" and _is_head(n, graph, vocabulary)]
    ids = {"input_ids"}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[0] in ids:
            ids.add(node.output[0])
    gather = next(
        (n for n in graph.node if n.op_type == "Gather" and n.input[0] in weights and n.input[1] in ids), None
    )
    if gather is None or weights[gather.input[0]].dims[1] % BLOCK:
        return heads, None
    table = numpy_helper.to_array(weights[gather.input[0]])
    graph.initializer.append(numpy_helper.from_array(table.T.copy(), "table"))
    tied = [i for i, n in enumerate(graph.node) if n.op_type == "FusedMatMul" and n.input[1] == gather.input[0]]
    for i in tied:
        node = graph.node[i]
        scale = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        output = node.output[0] if scale == 1 else "unscaled"
        scaling = (
            [helper.make_node("Mul", ["unscaled", "scale"], [node.output[0]], name="scaled")] if scale != 1 else []
        )
        if scaling:
            graph.initializer.append(helper.make_tensor("scale", 1, [], [scale]))
        nodes = list(graph.node)
        nodes[i : i + 1] = [helper.make_node("MatMul", [node.input[0], "table"], [output], name="table"), *scaling]
        del graph.node[:]
        graph.node.extend(nodes)
    if not tied:
        place = list(graph.node).index(gather)
        graph.node.insert(place + 1, helper.make_node("MatMul", [gather.output[0], "table"], ["nowhere"], name="table"))
    return [*heads, "table"], gather


def _look_up_in_blocks(graph: Any, gather: Any) -> None:
    """Look embeddings up in the quantised blocks (V, D / 32, 32) of the product "table"."""
    weights = {t.name: t for t in graph.initializer}
    nodes = list(graph.node)
    product = next(
        n for n in nodes if n.op_type == "MatMulNBits" and n.input[1] in weights and n.input[1].startswith("table")
    )
    rows, blocks, _ = weights[product.input[1]].dims
    for name, shape in (("blocks", [rows, blocks, 1]), ("row", [0, 0, blocks * BLOCK])):
        graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), name))
    place = next(i for i, n in enumerate(nodes) if n.output[0] == gather.output[0])
    nodes[place : place + 1] = [
        helper.make_node("Reshape", [product.input[2], "blocks"], ["scales"], name="scales"),
        helper.make_node(
            "GatherBlockQuantized", [product.input[1], gather.input[1], "scales"], ["rows_of_blocks"], name="look up",
            domain=MICROSOFT, gather_axis=0, quantize_axis=2, block_size=BLOCK, bits=8,
        ),
        helper.make_node("Reshape", ["rows_of_blocks", "row"], [gather.output[0]], name="rows"),
    ]  # fmt: skip
    if product.output[0] == "nowhere":
        nodes.remove(product)
    del graph.node[:]
    graph.node.extend(nodes)
