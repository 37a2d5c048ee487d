"""Write a small Llama with random weights, for a real vLLM; run by vLLM's own Python.

`python tests/perf/tiny_llama.py FOLDER`: 27 million parameters, a token a character.
"""

import string
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
SPECIAL = ("<s>", "</s>", "<unk>")


def main(folder: Path) -> None:
    """The tokenizer and the weights."""
    words = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    words += [f"<{i}>" for i in range(VOCABULARY - len(words) - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate([*words, *SPECIAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    # Large enough that a step is mostly the model, small enough that a core does fifty a second.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
