"""Small tokenizers of every family, trained on a few lines, with the special tokens of a chat template."""

import re
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Seventeen times twenty is 340, and four plus two is six.\n\n",
    "<tools> You may call one or more functions: get_weather(city='Paris'). It is sunny, 21 degrees.\n",
    "system user assistant tool developer\nYou are a helpful assistant. What is 17*20? Yes. No. Bonjour, ça va? 你好\n\n",
] * 4
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|</?think>|</?tool_call>|<[A-Z_]+_TOKEN\|?>"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = ("byte-level BPE", "SentencePiece with a prefix blank", "SentencePiece", "Unigram", "WordPiece")


def _trained(family: str) -> tuple[Tokenizer, dict[str, str]]:
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(
                vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            ),
        )
        return tokenizer, {"eos_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}
    if family.startswith("SentencePiece"):
        prefix = [normalizers.Prepend("▁")] if "prefix" in family else []
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        tokenizer.train_from_iterator(
            [t.replace(" ", "▁") for t in CORPUS],
            trainers.BpeTrainer(
                vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
            ),
        )
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return tokenizer, ends
    if family == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Replace(Regex("\n"), " ⏎ ")
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        tokenizer.train_from_iterator(
            CORPUS,
            trainers.UnigramTrainer(
                vocab_size=180, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
            ),
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        return tokenizer, ends
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer, {
        "unk_token": "[UNK]",
        "bos_token": "[CLS]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
    }


@lru_cache
def _specification(family: str) -> tuple[str, dict[str, str]]:
    tokenizer, special = _trained(family)
    return tokenizer.to_str(), special


def make_tokenizer(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a family, with a chat template and its special tokens."""
    specification, special = _specification(family)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(specification), **special)
    if template is not None:
        tokenizer.chat_template = template
        names = dict.fromkeys(SPECIAL.findall(template))
        if family == "WordPiece" and tokenizer.eos_token is None:
            names |= {"<|im_end|>": None}
        tokenizer.add_tokens(
            [AddedToken(name, special=not name.startswith(("<think", "</think", "<tool", "</tool"))) for name in names]
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
