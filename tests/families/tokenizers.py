"""Tokenizers small enough to write down: a character is a token."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + ",.:- "


def clip_tokenizer(folder: Path, length: int = 8) -> CLIPTokenizer:
    """A CLIP tokenizer that knows single characters and merges nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [c for c in CHARACTERS if c != " "]
    words = [*pieces, *(f"{c}</w>" for c in pieces), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def t5_tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    """A tokenizer that pads and ends as T5's does."""
    words = ["<pad>", "</s>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )
