"""KV Prediction: with the base as its own small model nothing is lost; the maps learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.kv_prediction import (
    PlainKV,
    init_maps,
    load_predictor,
    predict,
    prediction_loss,
    prefill_predicted,
    save_maps,
)
from lookahead_jax.prompts.read import read_prompt
from lookahead_jax.train.kv_prediction import maps_step
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from tests import tiny
from tests.test_families import MIXED
from tests.test_policies import LENGTHS, PLAIN, RICH, weights

SMALL = tiny.config(num_hidden_layers=2, hidden_size=16, num_attention_heads=2,
                    num_key_value_heads=1, intermediate_size=32)  # fmt: skip


@pytest.mark.parametrize(
    "model", [PLAIN, *(pytest.param(model, marks=pytest.mark.slow) for model in (RICH, MIXED))]
)
def test_a_model_predicts_itself(model):
    tokens = tiny.batch(LENGTHS, model)
    maps = init_maps(jax.random.key(0), model, model)
    params = weights(model)
    found = prefill_predicted(
        params, tokens, maps, config=model, aux_params=params, aux_config=model, new_tokens=8
    )
    full = read_prompt(
        params, tokens, config=model, policy=make_policy("full"), budget=0, new_tokens=8
    )
    largest = np.abs(full.logits).max()
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-5 * largest)
    np.testing.assert_array_equal(found.cache.next_pos, LENGTHS)
    for row, length in enumerate(LENGTHS):
        pos, k = (np.asarray(a)[0, row, 0] for a in (found.cache.pos, found.cache.k))
        assert (np.sort(pos[pos >= 0]) == np.arange(length)).all()
        own = np.asarray(full.cache.k)[0, row, 0, :length]
        np.testing.assert_allclose(k[:length], own, atol=1e-5 * np.abs(own).max())


def test_generate_reads_with_the_predictor_that_was_stored(tmp_path, base):
    rng = np.random.default_rng(0)
    maps = jax.tree.map(
        lambda a: a + jnp.asarray(0.02 * rng.standard_normal(a.shape), jnp.float32),
        init_maps(jax.random.key(0), base.config, base.config),
    )
    save_maps(tmp_path, maps, None, 2)
    predictor = load_predictor(tmp_path, base)
    assert predictor.aux.config.num_layers == 2
    prompts = rng.integers(5, 4000, (2, 24)).tolist()
    given = dict(policy=lk.make_policy("full"), max_new_tokens=4, eos_ids=())
    found = lk.generate(base, prompts, reader=predictor, **given)
    read = prefill_predicted(
        base.params, jnp.asarray(lk.pad_batch(prompts, config=base.config)), maps,
        config=base.config, aux_params=predictor.aux.params, aux_config=predictor.aux.config,
        new_tokens=4,
    )  # fmt: skip
    expected = lk.decode(
        base.params, read.cache, read.logits, config=base.config, max_new_tokens=4
    ).tokens
    assert found.tokens == np.asarray(expected).tolist()
    assert found.tokens != lk.generate(base, prompts, **given).tokens
    with pytest.raises(ValueError, match="leave evict_every out"):
        lk.generate(base, prompts, reader=predictor, evict_every=8, **given)


@pytest.fixture(scope="module")
def base():
    return lk.load(lk.EMBEDDED_MODEL)


@pytest.mark.parametrize("part", ["k", "v"])
def test_maps_of_another_model_are_refused(tmp_path, base, part):
    maps = init_maps(jax.random.key(0), base.config, base.config)
    save_maps(tmp_path, maps.replace(**{part: maps.k[..., :7]}), None, 2)
    with pytest.raises(ValueError, match="do not fit"):
        load_predictor(tmp_path, base)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("aux.json", "{}", r"aux\.json: expected `aux` and `layers`"),
        ("aux.json", "[]", r"aux\.json: expected a JSON object"),
        ("aux.json", '{"aux": 1, "layers": null}', r"aux\.json: expected `aux` and `layers`"),
        ("aux.json", "{", r"aux\.json: not valid JSON"),
        ("maps.npz", "text", r"maps\.npz is not a readable"),
    ],
)
def test_files_that_are_no_maps_are_named(tmp_path, base, file, content, message):
    save_maps(tmp_path, init_maps(jax.random.key(0), base.config, base.config), None, None)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_predictor(tmp_path, base)


def test_the_small_model_goes_where_the_base_is(tmp_path, base):
    rng = np.random.default_rng(0)
    maps = init_maps(jax.random.key(0), base.config, base.config)
    save_maps(tmp_path, maps, str(lk.EMBEDDED_MODEL), None)
    prompts = rng.integers(5, 4000, (4, 24)).tolist()
    split = lk.load(lk.EMBEDDED_MODEL, mesh=make_mesh())
    given = dict(policy=lk.make_policy("full"), max_new_tokens=4, eos_ids=())
    found, alone = (
        lk.generate(model, prompts, reader=load_predictor(tmp_path, model), **given).tokens
        for model in (split, base)
    )
    assert found == alone


@pytest.mark.slow
def test_a_step_moves_the_maps_towards_the_base():
    tokens = tiny.batch((30, 17), PLAIN)
    optimizer = make_optimizer(OptimizerConfig(rate=3e-2, warmup=1), 30)
    maps = init_maps(jax.random.key(0), PLAIN, SMALL)
    assert maps.k.shape == (3, 8, 16)
    state, losses = (maps, optimizer.init(maps)), []
    settings = dict(config=PLAIN, aux_config=SMALL, optimizer=optimizer)
    for _ in range(30):
        state, loss = maps_step(state, tiny.params(PLAIN), tiny.params(SMALL), tokens, **settings)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_padding_has_no_part_in_the_loss():
    tokens = tiny.batch((30, 17), PLAIN)
    rng = np.random.default_rng(0)

    def drawn(layers, width):
        shape = (layers, *tokens.shape, width)
        return PlainKV(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))

    aux, base = drawn(2, 8), drawn(3, 16)
    maps = init_maps(jax.random.key(0), PLAIN, SMALL)
    valid = tokens >= 0
    loss = prediction_loss(maps, aux, base, valid)
    noisy = jax.tree.map(lambda a: jnp.where(valid[None, :, :, None], a, 1e3), base)
    assert prediction_loss(maps, aux, noisy, valid) == pytest.approx(float(loss))
    guess = np.einsum("btc,cd->btd", np.asarray(aux.k[1]), np.asarray(maps.k[2]))
    np.testing.assert_allclose(predict(maps, aux).k[2], guess, rtol=1e-4, atol=1e-5)
