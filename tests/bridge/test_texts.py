"""One rule for what a text's tokens are: alone, in a batch, as padded ids, and in a corpus."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

import transformer_lens_bd3lm as bd3lm
from tests.helpers import small
from transformer_lens_bd3lm.errors import InputError

WORDS = ["to", "be", "or", "not"]


def word_level(folder: Path, words: list[str], **special: str) -> int:
    """Save a tokenizer of whole words, the mask among them."""
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="or"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return len(words)


def gpt2(folder: Path) -> int:
    """Bytes; the end of text is BOS and padding too, and the mask is not known yet."""
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    special = {"bos_token": end, "eos_token": end, "pad_token": end}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return len(words) + 1


def bert(folder: Path) -> int:
    """``[CLS]`` before a text and ``[SEP]`` after it; padding and mask are its own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return len(words)


def pad_is_eos(folder: Path) -> int:
    """BOS of its own, and padding with the end of text."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return word_level(folder, ["<s>", "</s>", *WORDS, "[MASK]"], **special, mask_token="[MASK]")


def without_eos(folder: Path) -> int:
    """BOS and a mask, and no other special token."""
    words = ["<s>", *WORDS, "[MASK]"]
    return word_level(folder, words, bos_token="<s>", mask_token="[MASK]")


KINDS = {"gpt2": gpt2, "bert": bert, "pad_is_eos": pad_is_eos, "without_eos": without_eos}
ENDS = {"gpt2": "<|endoftext|>", "bert": "[SEP]", "pad_is_eos": "</s>", "without_eos": "not"}
FAMILY = {
    "blocks": {},
    "mdlm": {"cross_attn": False, "architectures": ["MDLM"], "block_size": 64},
    "ar": {
        "cross_attn": False, "causal": True, "adaln": False, "architectures": ["AR"],
        "block_size": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def booted(kind, tmp_path_factory):
    """Bridges of one tokenizer by member of the family, float64."""

    def boot(member):
        folder = tmp_path_factory.mktemp(kind)
        size = KINDS[kind](folder)
        made = small.model(0, model_length=64, vocab_size=size, **FAMILY[member])
        made.save_pretrained(folder)
        return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float64)

    return {member: boot(member) for member in FAMILY}


@pytest.fixture(scope="module")
def bridge(booted):
    return booted["blocks"]


def texts_of(kind, masks=False):
    """Texts of some words, of which some end with the token that ends texts."""
    longest = 3 if kind == "gpt2" else 5  # words of several tokens
    words = st.lists(st.sampled_from([*WORDS, *(["[MASK]"] if masks else [])]), max_size=longest)
    end = st.sampled_from(["", f" {ENDS[kind]}", f" {ENDS[kind]} {ENDS[kind]}"])
    text = st.builds(lambda words, end: " ".join(words) + end, words, end)
    return st.lists(text, min_size=1, max_size=4)


def bounded(test):
    """Few examples, the same ones at every run."""
    check = settings(
        max_examples=8, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    return check(test)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.filterwarnings("ignore::transformer_lens_bd3lm.errors.OffDistributionWarning")
@pytest.mark.parametrize("member", FAMILY)
@bounded
@given(st.data())
def test_a_text_has_the_same_logits_alone_in_a_batch_and_as_padded_ids(booted, kind, member, data):
    bridge, texts = booted[member], data.draw(texts_of(kind, masks=member != "ar"))
    ids = bridge.to_tokens(texts)
    with torch.no_grad():
        batches = [bridge(texts), bridge(tuple(texts)), bridge(ids), bridge(ids.to(torch.int32))]
        batches.append(bridge.run_with_cache(ids)[0])
        for row, text in enumerate(texts):
            alone = bridge(text)[0]
            assert len(alone) == bridge.to_tokens(text).shape[1]
            for batch in [*batches, bridge(ids[row])[None].expand(len(texts), -1, -1, -1)[:, 0]]:
                close(batch[row, : len(alone)], alone)


@bounded
@given(st.data())
def test_both_streams_are_padded_where_the_clean_text_ends(bridge, kind, data):
    texts = data.draw(texts_of(kind))
    x_0 = bridge.to_tokens(texts)
    noise = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(len(texts))) < 0.5
    noise[:, 0] = False
    x_t = x_0.masked_fill(noise, bridge.cfg.mask_token_id)  # of padding too
    joined = torch.cat([x_t, x_0], dim=1)
    with torch.no_grad():
        together = bridge(x_t, clean=x_0)
        close(bridge(x_t, clean=texts), together)
        close(bridge(joined, sample_mode=False), together)
        for row, text in enumerate(texts):
            alone = bridge.to_tokens(text)
            n = alone.shape[1]
            close(together[row, :n], bridge(x_t[row : row + 1, :n], clean=alone)[0])


@pytest.mark.parametrize("member", FAMILY)
@bounded
@given(st.data())
def test_a_text_has_the_same_nats_alone_in_a_corpus_and_as_ids(booted, kind, member, data):
    bridge, texts = booted[member], data.draw(texts_of(kind))
    texts = [text for text in texts if text] or ["to be"]
    block_size = 2 if member == "blocks" else None
    how = {"max_states": 2**64} if member != "mdlm" else {"method": "monte_carlo", "seed": 3}
    sources = (texts, iter(texts), bridge.to_tokens(texts), [{"text": text} for text in texts])
    corpora = [bd3lm.likelihood(bridge, source, block_size, **how).nelbo for source in sources]
    for corpus in corpora[1:]:
        close(corpus.nats, corpora[0].nats)
    if member == "mdlm":
        return
    for row, text in enumerate(texts):
        for source in (text, bridge.to_tokens(text)):
            alone = bd3lm.exact(bridge, source, block_size)
            close(alone.nelbo, corpora[0].nats[row : row + 1])
            assert alone.total_tokens == corpora[0].token_counts[row]


@bounded
@given(st.data())
def test_a_prompt_is_continued_the_same_alone_in_a_batch_and_as_padded_ids(bridge, kind, data):
    prompts = data.draw(texts_of(kind, masks=True))
    sources = (prompts, bridge.to_tokens(prompts), [bridge.to_tokens(p)[0] for p in prompts])
    runs = [bd3lm.denoise(bridge, source, max_new_tokens=3) for source in sources]
    for row, prompt in enumerate(prompts):
        noise = bd3lm.Noise(0, rows=[row])
        alone = bd3lm.denoise(bridge, prompt, max_new_tokens=3, noise=noise)
        n = alone.tokens.shape[1]
        for run in runs:
            assert run.tokens[row, :n].tolist() == alone.tokens[0].tolist()
            assert run.ends[row] == n


@bounded
@given(st.data())
def test_the_loss_of_a_batch_counts_each_token_of_its_texts_once(booted, kind, data):
    ar, texts = booted["ar"], data.draw(texts_of(kind))
    texts = [text for text in texts if text] or ["to be"]
    with torch.no_grad():
        alone = [(ar(t, return_type="loss"), ar.to_tokens(t).shape[1] - 1) for t in texts]
        mean = sum(loss * n for loss, n in alone) / sum(n for _, n in alone)
        close(ar(texts, return_type="loss"), mean)
        ids = ar.to_tokens(texts)
        close(ar(ids, return_type="loss"), mean)
        close(ar.loss_fn(ar(ids), ids), mean)


def test_nothing_is_appended_and_what_a_text_spells_stays(bridge, kind):
    end = bridge.tokenizer(ENDS[kind], add_special_tokens=False)["input_ids"]
    alone = bridge.to_tokens("to be")[0].tolist()
    text = f"to be{'' if kind == 'gpt2' else ' '}{ENDS[kind]}"
    assert bridge.to_tokens(text)[0].tolist() == [*alone, *end]
    assert bridge.to_tokens(text, prepend_bos=False)[0].tolist() == [*alone[1:], *end]
    assert bridge.to_tokens(["", text])[0].tolist()[:2] == [alone[0], bridge.cfg.pad_token_id]
    assert bridge.to_tokens("to be " * 100).shape == (1, 64)


def test_the_clean_text_begins_as_the_noisy_one_does(bridge, kind):
    noisy = "to be n[MASK]t" if kind == "gpt2" else "to be [MASK]"
    seen = []
    watch = [("embed.hook_in", lambda ids, hook: seen.append(ids.clone()))]
    for prepend_bos in (True, False):
        bridge.run_with_hooks(noisy, clean="to be not", prepend_bos=prepend_bos, fwd_hooks=watch)
        x_t, x_0 = seen.pop()[0].chunk(2)
        assert torch.equal(x_0, bridge.to_tokens("to be not", prepend_bos=prepend_bos)[0])
        assert torch.equal(
            x_0[x_t != bridge.cfg.mask_token_id], x_t[x_t != bridge.cfg.mask_token_id]
        )
    bos = bridge.tokenizer.bos_token
    with pytest.raises(InputError, match="both streams are"):
        bridge(f"{bos} {noisy}", clean="to be not", prepend_bos=False)


def test_a_mask_that_is_given_decides_in_place_of_the_padding(bridge):
    ids = bridge.to_tokens(["to be or not", "to be"])
    ends = (ids != bridge.cfg.pad_token_id).sum(1)
    real = torch.arange(ids.shape[1]) < ends[:, None]
    other = ids.masked_fill(~real, -100)
    with torch.no_grad():
        wanted = bridge(ids)
        for hidden in (ids, other):
            for key in ("attention_mask", "one_zero_attention_mask"):
                found = bridge(hidden, **{key: real.long()})
                close(found[real], wanted[real])


def test_the_training_loss_of_padded_texts_is_that_of_each(bridge):
    texts = ["to be or not", "to be"]
    x_0 = bridge.to_tokens(texts)
    x_t = x_0.clone()
    x_t[:, -2:] = bridge.cfg.mask_token_id  # of padding too
    x_t[1, 2] = bridge.cfg.mask_token_id
    real = x_0 != bridge.cfg.pad_token_id
    logits = bridge(x_t, clean=x_0)
    settings = {"mask_id": bridge.cfg.mask_token_id, "per_token": True}
    each = bd3lm.diffusion_loss(logits, x_t, x_0, 0.5, attention_mask=real, **settings)
    for row, text in enumerate(texts):
        alone, n = bridge.to_tokens(text), int(real[row].sum())
        noisy = x_t[row : row + 1, :n]
        wanted = bd3lm.diffusion_loss(bridge(noisy, clean=alone), noisy, alone, 0.5, **settings)
        close(each[row, :n], wanted[0])
        assert not bool(each[row, n:].any())


def test_padding_on_the_left_or_of_the_noisy_text_alone_is_refused(bridge):
    left = bridge.to_tokens(["to be or", "to"], padding_side="left")
    for call in (bridge, lambda ids: bd3lm.denoise(bridge, ids, max_new_tokens=2)):
        with pytest.raises(InputError, match="pad on the right"):
            call(left)
    x_0, x_t = (bridge.to_tokens(["to be or", text]) for text in ("to be or", "to"))
    with pytest.raises(InputError, match="row 1: the noisy text is padded"):
        bridge(x_t, clean=x_0)


def test_rows_of_several_lengths_are_refused_where_one_is_asked_for(bridge):
    texts = ["to be or", "to"]
    for call in (bd3lm.exact, bd3lm.nelbo):
        with pytest.raises(InputError, match="likelihood"):
            call(bridge, texts, block_size=2)
        with pytest.raises(InputError, match="padded"):
            call(bridge, bridge.to_tokens(texts), block_size=2)


def test_a_word_that_the_tokenizer_cannot_read_is_refused_by_name():
    bridge = TransformerBridge.boot_transformers(bd3lm.GRAMMAR)
    for call in (
        lambda: bridge("a b nobody"),
        lambda: bd3lm.denoise(bridge, "nobody", max_new_tokens=2),
        lambda: bd3lm.likelihood(bridge, ["a", "nobody"]),
        lambda: bd3lm.exact(bridge, "nobody"),
    ):
        with pytest.raises(InputError, match="nobody.*without an unknown token"):
            call()


@pytest.mark.parametrize("given", [["to", 3], [], [["to"]], [b"to"], [[0, 1]]])
def test_a_list_of_other_things_than_strings_is_no_text(bridge, given):
    for call in (bridge, bridge.to_tokens):
        with pytest.raises(InputError, match="a list of"):
            call(given)
    with pytest.raises(InputError, match="a list of"):
        bridge("to be", clean=given)


def test_text_that_spells_the_padding_is_refused(bridge, kind):
    if kind == "bert":
        with pytest.raises(InputError, match=r"spells '\[PAD\]'"):
            bridge("to be [PAD]")
    else:
        assert bridge.cfg.pad_token_id > bridge.cfg.d_vocab, "which no text can spell"
        padded = bridge.to_tokens(["to be", "to"])
        assert bridge.to_str_tokens(padded[1])[-1] == "" and len(bridge.to_string(padded)) == 2


def test_a_path_is_not_measured_as_a_text(tmp_path, monkeypatch):
    bridge = TransformerBridge.boot_transformers(bd3lm.GRAMMAR)
    file = tmp_path / "sonnets"
    file.write_text("a b c")
    monkeypatch.chdir(tmp_path)
    for path in (str(file), "sonnets", "nowhere.txt", "folder/other.jsonl"):
        for call in (bd3lm.exact, bd3lm.nelbo, bd3lm.likelihood):
            with pytest.raises(InputError, match=r"Path\("):
                call(bridge, path, 2)
        with pytest.raises(InputError, match=r"Path\("):
            bd3lm.sweep_block_sizes(bridge, ["a b", path], (1, 2))
    wanted = bd3lm.exact(bridge, "a b c", 2).nll
    close(bd3lm.likelihood(bridge, Path("sonnets"), 2).nll.nats, wanted)


def test_narrow_integers_are_the_same_ids():
    bridge = TransformerBridge.boot_transformers(bd3lm.TINY)
    ids = torch.tensor([[0, 30, 40, 255, 255]])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        run = bd3lm.denoise(bridge, ids.to(dtype), max_new_tokens=3)
        assert run.ends.tolist() == [8]
        assert bd3lm.likelihood(bridge, ids.to(dtype), 2).nll.token_counts.tolist() == [4]
        assert bd3lm.exact(bridge, ids.to(dtype), 2).total_tokens == 4
