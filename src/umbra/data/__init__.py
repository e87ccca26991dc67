"""Records to token batches: prompt/completion, messages, text with or without a label; only answers carry labels.

sources    names → files, folders, saved data sets, data sets of the hub
readers    sources → rows, by text_files, from_json, from_csv, from_arrow and splits
rows       rows and their places
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
from .rows import Rows
from .sources import local_files

__all__ = [
    "ESCALATION",
    "MARK",
    "ChatFormatter",
    "Collator",
    "Labels",
    "Record",
    "Rows",
    "encode_all",
    "end_tokens",
    "local_files",
    "read_hub",
    "read_records",
    "read_rows",
    "record_kind",
    "shadows_own",
]
