"""CLIP's tokenizer cut to a small vocabulary, for text towers whose token table has few rows.

CLIP's byte-pair encoding is a list of merges, the most frequent first. Its first N merges are the
byte-pair encoding that the same training would have given with a smaller vocabulary: they depend on
no data of ours, write every text (a rare word takes more tokens), and come with open_clip.

    id 0           <pad>
    1 to 512       the bytes, and the bytes that end a word
    then           one a merge
    the last two   <start_of_text>, <end_of_text>: the end is the largest, which the tower looks for

It is a Hugging Face tokenizer, so that a folder with its files is all that open_clip needs:
`open_clip.get_tokenizer("local-dir:FOLDER")`.
"""

import tempfile

import open_clip
from open_clip.tokenizer import HFTokenizer

PAD, START, END = "<pad>", "<start_of_text>", "<end_of_text>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # as open_clip's


def small_tokenizer(vocab_size: int, context_length: int) -> HFTokenizer:
    """CLIP's tokenizer with its first merges only.

    Parameters
    ----------
    vocab_size : int
        Number of tokens, from 515 on: bytes, the three special ones, merges.
    context_length : int
        Tokens a text, start and end included; longer ones are cut, shorter ones padded with 0.

    Returns
    -------
    open_clip.tokenizer.HFTokenizer
        List of str -> (n, context_length) Tensor of int64. `save_pretrained(folder)` writes it.

    Raises
    ------
    ValueError
        If the vocabulary is too small for the bytes, or larger than CLIP's.

    Examples
    --------
    >>> from mclip.models.vocabulary import small_tokenizer
    >>> small_tokenizer(4096, 8)(["a red apple"])[0].tolist()
    [4094, 321, 737, 3056, 4095, 0, 0, 0]
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    clip = open_clip.SimpleTokenizer()
    units, ranked = list(clip.encoder)[:512], list(clip.bpe_ranks)
    count = vocab_size - len(units) - 3
    if not 0 <= count <= len(ranked):
        raise ValueError(
            f"vocab_size: expected {len(units) + 3} to {len(units) + 3 + len(ranked)}, "
            f"found {vocab_size}"
        )
    merges = ranked[:count]
    words = [PAD, *units, *(first + second for first, second in merges), START, END]
    backend = Tokenizer(
        BPE({word: i for i, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, len(words) - 2), (END, len(words) - 1)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=START, eos_token=END
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return HFTokenizer(folder, context_length=context_length)
