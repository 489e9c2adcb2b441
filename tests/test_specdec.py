"""specdec: when its chains end, what its head learns, and the head's files; against NumPy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lookahead_jax.cli.options import DraftingOptions
from lookahead_jax.drafters.acceptance_head import init_head, load_head, save_head
from lookahead_jax.train import specdec
from lookahead_jax.train.data import DataConfig, prepare
from tests import reference, tiny
from tests.drafted import draft_model, trusting_head, two_steps

PROMPTS = tiny.prompts((17, 9, 12, 6))
ROOTS = [3, 50, 7, 90]
AGREED = [2, 0, -1, 5]


def judged(head, hidden):
    """The probabilities of the two classes."""
    head = jax.tree.map(lambda a: np.asarray(a, np.float64), head)
    for weight, bias in zip(head.blocks, head.block_biases, strict=True):
        z = hidden @ weight + bias
        hidden = hidden + z / (1 + np.exp(-z))
    return reference.softmax(hidden @ head.out + head.out_bias)


def test_a_chain_ends_where_a_rejection_is_likely():
    head, least, depth = trusting_head(), 2, 6
    drafter = draft_model("specdec", head=head, depth=depth)
    config, lengths = tiny.config(), set()
    params = tiny.params(config)
    for step, (texts, (tokens, parents), *_) in enumerate(
        two_steps(drafter, PROMPTS, ROOTS, AGREED, 8)
    ):
        for row, text in enumerate(texts):
            drafts = [int(token) for token in tokens[row, 1:] if token >= 0]
            np.testing.assert_array_equal(parents[row], np.arange(-1, 7))
            if AGREED[row] < 0 and step:  # it sat out the last step
                assert not drafts
                continue
            chances, hidden = reference.next_tokens(params, config, text + drafts)
            first = len(text) - 1  # the root's place
            assert drafts == chances[first:-1].argmax(-1).tolist()
            accepted = judged(head, hidden[first + 1 :])[:, 1]
            length = least  # the newest token is not judged
            while length < depth and 1 - np.prod(accepted[: length - 1]) <= 0.3:
                length += 1
            assert len(drafts) == length
            lengths.add(length)
    assert len(lengths) > 2


def test_drafts_are_judged_as_the_target_would():
    """Two models, rows of several lengths: what is read, its hidden states and its chances."""
    config = tiny.config(num_hidden_layers=1)
    target, draft = tiny.params(config, 1), tiny.params(config, 2)
    prompts = np.array([[5, 9, 2, 8], [7, -1, -1, -1], [4, 4, 1, -1]], np.int32)
    responses = np.array([[3, 1, 6, 2, 9], [8, 8, 8, 8, 8], [2, 5, -1, -1, -1]], np.int32)
    key = jax.random.key(3)
    found = jax.jit(
        specdec.judged_drafts, static_argnames=("config", "draft_config", "mixed")
    )(
        target, draft, prompts, responses, key, config=config, draft_config=config, mixed=0.4
    )  # fmt: skip
    draw, mix = jax.random.split(key)
    own = np.asarray(jax.random.bernoulli(mix, 0.4, responses.shape))
    assert own.any()
    np.testing.assert_array_equal(found.counted, (responses >= 0) & ~own)
    texts = [
        [*prompt[prompt >= 0], *response[response >= 0]]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    q = np.full((*responses.shape, config.vocab_size), -1.0)
    p = q.copy()
    for row, text in enumerate(texts):
        n = int((responses[row] >= 0).sum())
        q[row, :n], p[row, :n] = (
            reference.next_tokens(params, config, text)[0][-n - 1 : -1]
            for params in (draft, target)
        )
    drafted = np.asarray(jax.random.categorical(draw, jnp.asarray(q, jnp.float32)))
    for row, text in enumerate(texts):
        n = int((responses[row] >= 0).sum())
        tokens = drafted[row, :n]
        at = np.arange(n), tokens
        np.testing.assert_allclose(
            found.chance[row, :n], np.minimum(1, np.exp(p[row][at] - q[row][at])), rtol=1e-3
        )
        text = [*text[:-n], *np.where(own[row, :n], responses[row, :n], tokens)]
        np.testing.assert_allclose(
            found.hidden[row, :n], reference.next_tokens(draft, config, text)[1][-n:], atol=1e-3
        )

    head = trusting_head()
    chances = judged(head, np.asarray(found.hidden, np.float64))
    chance, total, loss = np.asarray(found.chance), 0.0, 0.0
    for place in zip(*np.nonzero(found.counted), strict=True):
        accepted, rejected = chance[place], 6 * (1 - chance[place])
        total += accepted + rejected
        loss -= accepted * np.log(chances[place][1]) + rejected * np.log(chances[place][0])
    assert float(specdec.head_loss(head, found, 6.0)) == pytest.approx(loss / total, rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, a draft model, and rows for them."""
    folder = tmp_path_factory.mktemp("specdec")
    tiny.model_folder(folder / "target", num_hidden_layers=1, vocab_size=96)
    tiny.model_folder(folder / "draft", num_hidden_layers=1, vocab_size=96, intermediate_size=32)
    rows = [
        {"prompt": p, "response": p[3:8]}
        for p in tiny.prompts((12, 10, 14, 11, 13, 9, 12, 15), vocab=96)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        DataConfig(
            model=folder / "target", source=(folder / "rows.jsonl",), out=folder / "data",
            max_prompt=64,
        )
    )  # fmt: skip
    return folder


def test_a_run_goes_on_where_it_was_killed(folder, monkeypatch, capsys):
    """Its head is that of a run without a break, and has learned."""
    config = specdec.HeadConfig(
        model=folder / "target", draft_model=folder / "draft", data=(folder / "data",),
        run=folder / "straight", layers=2, epochs=8, batch=4, micro_batches=1, rate=3e-3,
        save_every=4,
    )  # fmt: skip
    losses, step = [], specdec.head_step

    def watched(*args, **settings):
        if len(losses) == killed:
            raise KeyboardInterrupt
        state, loss = step(*args, **settings)
        losses.append(float(loss))
        return state, loss

    monkeypatch.setattr(specdec, "head_step", watched)
    killed = 99
    specdec.train_head(config)
    assert len(losses) == 16
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.02
    other, killed = dataclasses.replace(config, run=folder / "killed"), 16 + 6
    with pytest.raises(KeyboardInterrupt):
        specdec.train_head(other)
    assert not (folder / "killed" / "head.safetensors").exists()
    killed = 99
    specdec.train_head(other)
    assert len(losses) == 16 + 6 + 12  # it went on after step 4
    straight, resumed = (
        (folder / run / "head.safetensors").read_bytes() for run in ("straight", "killed")
    )
    assert straight == resumed


def test_a_head_is_read_as_it_was_written_and_by_its_model_only(tmp_path):
    params, path = tiny.params(tiny.config()), tmp_path / "head.safetensors"
    head = trusting_head()
    save_head(path, head, params=params)
    jax.tree.map(np.testing.assert_array_equal, load_head(path, params=params), head)
    names = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(names["model.1.linear.weight"], head.blocks[1].T)
    assert names["model.3.weight"].shape == (2, 32)
    options = DraftingOptions(
        drafter="specdec", draft_model=tmp_path, drafter_arg=(f"head={path}", "depth=4")
    )
    made = options.make(draft_model().model)
    assert made.depth == 4
    jax.tree.map(np.testing.assert_array_equal, made.head, head)
    with pytest.raises(
        ValueError, match=r"head\.safetensors: this acceptance head was trained for a"
    ):
        load_head(path, params=tiny.params(tiny.config(), 1))
    broken = dataclasses.replace(head, out=head.out.at[0, 0].set(jnp.nan))
    save_head(path, broken, params=params)
    with pytest.raises(ValueError, match="NaN or infinite"):
        draft_model("specdec", head=path)
    for content, complaint in (
        (b"{}", "is not a safetensors file"),
        (safetensors.numpy.save({"a": np.zeros(3)}), "is no acceptance head"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            draft_model("specdec", head=path)


def test_what_specdec_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"needs an acceptance head.*train specdec.*drafter-arg h"):
        draft_model("specdec")
    with pytest.raises(FileNotFoundError, match="does not exist: write it with lookahead train sp"):
        draft_model("specdec", head=tmp_path / "none")
    with pytest.raises(ValueError, match="reads 16 values and the draft model has 32"):
        draft_model("specdec", head=init_head(jax.random.key(0), 16, 1))
    with pytest.raises(ValueError, match="least=3 must be from 1 to depth=2"):
        draft_model("specdec", head=trusting_head(), least=3, depth=2)
    with pytest.raises(ValueError, match=r"threshold=1\.5 must be"):
        draft_model("specdec", head=trusting_head(), threshold=1.5)
