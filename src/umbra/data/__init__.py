"""Records to token batches: prompt/completion, messages, text with or without a label; only answers carry labels.

readers    files and data sets → rows
records    the forms of a record, and what each field means
chat       records → text and tokens
labels     classes and regression targets → numbers
batches    token batches
corpus     text for pretraining
"""

from .batches import Collator, encode_all, shadows_own
from .chat import ChatFormatter, end_tokens
from .labels import Labels
from .readers import read_hub, read_records, read_rows
from .records import ESCALATION, MARK, Record, record_kind

__all__ = [
    "ESCALATION",
    "MARK",
    "ChatFormatter",
    "Collator",
    "Labels",
    "Record",
    "encode_all",
    "end_tokens",
    "read_hub",
    "read_records",
    "read_rows",
    "record_kind",
    "shadows_own",
]
