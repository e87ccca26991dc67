"""Records → token batches: prompt and completion, messages, text with or without a label. Only answers are labelled.

    sources    names → files, folders, saved data sets, data sets of the hub
    readers    sources → rows, by text_files, from_json, from_csv, from_arrow and splits
    rows       rows and their places
    records    the contract: each column and field, its meaning, and what is refused
chat            records → text and tokens
conversation    messages in canonical form
template        a tokenizer's chat template
reasoning       the assistant's reasoning
turns           conversations → the prompts and answers of their turns
tokens          text → tokens; a prompt has the same tokens in training and in inference
labels          classes and regression targets → numbers
batches         token batches
corpus          text for pretraining
generated_text  text that the base generates for pretraining
"""

from umbra.data.batches import Collator, Example, encode_all, for_shadow_alone
from umbra.data.chat import ChatFormatter, end_tokens, needs_thinking
from umbra.data.labels import Labels, class_name, describe_classes
from umbra.data.readers import read_hub, read_records, read_rows
from umbra.data.records import ESCALATION, MARK, Record, normalize, record_kind
from umbra.data.rows import Rows
from umbra.data.sources import local_files
from umbra.data.tokens import encode_plain

__all__ = [
    "ESCALATION",
    "MARK",
    "ChatFormatter",
    "Collator",
    "Example",
    "Labels",
    "Record",
    "Rows",
    "class_name",
    "describe_classes",
    "encode_all",
    "encode_plain",
    "end_tokens",
    "for_shadow_alone",
    "local_files",
    "needs_thinking",
    "normalize",
    "read_hub",
    "read_records",
    "read_rows",
    "record_kind",
]
