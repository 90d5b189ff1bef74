"""The whole model against the reference, through the front door: what goes in, what comes out, how a cache goes on."""

import json
import shutil

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CONFIGS, TOLERANCE, Prompts, assert_close, their_inputs, to_torch

from glm4v_jax import Glm4v, Glm4vForConditionalGeneration, Glm4vModel, Glm4vTextModel, Glm4vVisionModel, make_batch
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.errors import MessageError

CASES = {
    "text": [[21]],
    "wide picture": [[5, ("image", (4, 12)), 4]],
    "tall picture": [[5, ("image", (12, 4)), 4]],
    "three pictures": [[2, ("image", (6, 4)), 3, ("image", (2, 10)), ("image", (4, 4)), 5]],
    "video": [[3, ("video", (3, 4, 6)), 4]],
    "two videos": [[3, ("video", (2, 4, 4)), 4, ("video", (3, 2, 6)), 2]],
    "rows of text and pictures": [[9], [2, ("image", (4, 6)), 7], [30], [("image", (6, 2)), 3, ("image", (4, 4)), 1]],
    "rows of videos": [[3, ("video", (2, 2, 6)), 4], [3, ("video", (3, 4, 2)), 4, ("video", (1, 2, 2)), 9]],
    "pictures and videos": [[2, ("image", (4, 6)), 3, ("video", (2, 4, 4)), 1, ("image", (2, 2)), 2]],
    "rows of everything": [
        [11], [("video", (2, 4, 2)), 3], [2, ("image", (4, 6)), 3, ("video", (2, 4, 4)), 1, ("image", (2, 2)), 2],
        [4, ("image", (2, 8)), 1], [("video", (1, 2, 2)), ("image", (4, 4)), 5],
    ],
}  # fmt: skip


def run(model, **inputs):
    """The reference, without gradients, and without the rope deltas of an earlier call."""
    import torch

    model.model.rope_deltas = None
    with torch.no_grad():
        return model(**inputs)


def config_of(name):
    return Glm4vConfig.from_dict(CONFIGS[name])


PADDED = [(case, padding) for case, rows in CASES.items() for padding in ["left", "right"][: len(rows)]]


@pytest.mark.parametrize(("case", "padding"), PADDED)
def test_logits_equal(ours, theirs, case, padding):
    reference = theirs("base")
    prompts = Prompts(config_of("base"), CASES[case], padding=padding, seed=len(case))
    expected = run(reference, **their_inputs(reference, prompts))
    assert_close(ours("base")(**prompts.inputs).logits, expected.logits, prompts.real)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "base"])
def test_configurations_equal(ours, theirs, name, seed):
    rows = [[11 + seed], [2, ("image", (4, 6)), 3, ("video", (1, 4, 2)), ("image", (2 * seed, 2)), 2]]
    reference = theirs(name)
    prompts = Prompts(config_of(name), rows, seed=seed, padding="left" if seed == 1 else "right")
    expected = run(reference, **their_inputs(reference, prompts))
    assert_close(ours(name)(**prompts.inputs).logits, expected.logits, prompts.real)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "odd", "wide"])
def test_long_prompts_equal(ours, theirs, name):
    """Mistakes of a partial rope show in positions by the hundred, of a blockwise softmax past a block."""
    rows = [[300, ("image", (8, 12)), 280], [530]]
    reference = theirs(name)
    prompts = Prompts(config_of(name), rows, seed=7)
    assert prompts.input_ids.shape[1] > 600
    expected = run(reference, **their_inputs(reference, prompts))
    assert_close(ours(name)(**prompts.inputs).logits, expected.logits, prompts.real)


def test_long_text_of_a_thousand_tokens_equals(ours, theirs):
    prompts = Prompts(config_of("base"), [[1030]], seed=3)
    expected = run(theirs("base"), **to_torch(prompts.inputs))
    assert_close(ours("base")(**prompts.inputs).logits, expected.logits)


def test_hidden_states_and_attentions_equal(ours, theirs):
    prompts = Prompts(config_of("base"), CASES["rows of text and pictures"], seed=5)
    asked = dict(output_hidden_states=True, output_attentions=True)
    expected = run(theirs("base"), **to_torch(prompts.inputs), **asked)
    found = ours("base")(**prompts.inputs, **asked)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(one, other, prompts.real)
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        assert_close(np.swapaxes(one, 1, 2), other.transpose(1, 2), prompts.real)
    assert_close(found.logits, expected.logits, prompts.real)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_labels_give_the_loss(ours, theirs, padding):
    prompts = Prompts(config_of("base"), CASES["rows of text and pictures"], padding=padding, seed=6)
    labels = np.where(prompts.real, prompts.input_ids, -100)
    labels[prompts.input_ids == prompts.config.image_token_id] = -100
    # A row's first token would be scored from the padding before it, where the reference computes what nobody means.
    labels[np.arange(len(labels)), prompts.real.argmax(axis=1)] = -100
    expected = run(theirs("base"), **to_torch(prompts.inputs), labels=to_torch({"x": labels})["x"])
    found = ours("base")(**prompts.inputs, labels=labels)
    np.testing.assert_allclose(found.loss, expected.loss.numpy(), rtol=TOLERANCE)
    assert found.loss.dtype == np.float32
    assert ours("base")(**prompts.inputs).loss is None


def test_logits_to_keep(ours, theirs):
    import torch

    prompts = Prompts(config_of("base"), [[14], [9]], seed=7)
    inputs = to_torch(prompts.inputs)
    assert_close(
        ours("base")(**prompts.inputs, logits_to_keep=np.int64(3)).logits,
        run(theirs("base"), **inputs, logits_to_keep=3).logits,
    )
    chosen = np.array([13, 11])
    expected = run(theirs("base"), **inputs, logits_to_keep=torch.tensor(chosen))
    assert_close(ours("base")(**prompts.inputs, logits_to_keep=chosen).logits, expected.logits)


def test_the_last_and_the_first_place_can_be_kept(ours):
    inputs = Prompts(config_of("base"), [[14], [9]], seed=7).inputs
    every = np.asarray(ours("base")(**inputs).logits)
    np.testing.assert_allclose(ours("base")(**inputs, logits_to_keep=99).logits, every, atol=TOLERANCE)
    ends = ours("base")(**inputs, logits_to_keep=[-14, 13]).logits
    np.testing.assert_allclose(ends, every[:, [0, 13]], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([14], "found index 14; expected indices from -14 to 13"),
        (np.array([0, 4000]), "found index 4000"),
        ([-15], "found index -15"),
        ([True] * 14, r"found bool \[14\]; expected a count or integers \[K\]"),
        ([0.5], r"found float64 \[1\]"),
        ([[1]], r"found int64 \[1, 1\]"),
        (-2, "found -2; expected a count >= 0, or indices"),
        (1.5, "found 1.5; expected a count"),
        ("all", "found 'all'; expected a count"),
    ],
)
def test_places_that_the_prompt_does_not_have_are_not_kept(ours, kept, message):
    """4.57.1 drops the first 2 for -2, and finds no index too large on every device."""
    with pytest.raises(MessageError, match=f"logits_to_keep: {message}"):
        ours("base")(input_ids=np.arange(1, 15)[None], logits_to_keep=kept)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_inputs_embeds_with_pixels(ours, theirs, kind):
    """Embeddings in place of tokens, placeholders too; positions must be given (4.57.1 falls back silently)."""
    import torch

    rows = [[5], [3, ("image", (4, 6)), 4]] if kind == "image" else [[5], [3, ("video", (2, 4, 2)), 4]]
    model, reference = ours("base"), theirs("base")
    prompts = Prompts(config_of("base"), rows, seed=8)
    expected = run(reference, **to_torch(prompts.inputs))
    inputs = prompts.inputs
    ids = inputs.pop("input_ids")
    embeds = model.model.get_input_embeddings(ids)
    with torch.no_grad():
        assert np.array_equal(embeds, reference.model.get_input_embeddings()(torch.tensor(ids)).numpy())
    for each in (model, model.model, model.language_model):
        assert np.array_equal(embeds, each.get_input_embeddings()(ids))
    positions, deltas = model.model.get_rope_index(
        ids, inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), inputs["attention_mask"]
    )
    found = model(inputs_embeds=embeds, position_ids=positions, **inputs)
    assert_close(found.logits, expected.logits, prompts.real)
    assert np.array_equal(found.rope_deltas, deltas)
    with pytest.raises(MessageError, match="position_ids"):
        model(inputs_embeds=embeds, **inputs)


def test_inputs_embeds_of_text(ours):
    prompts = Prompts(config_of("base"), [[14], [9]], seed=9)
    model = ours("base")
    embeds = model.model.get_input_embeddings(prompts.input_ids)
    found = model(inputs_embeds=embeds, attention_mask=prompts.attention_mask)
    expected = model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask)
    assert np.array_equal(np.asarray(found.logits)[prompts.real], np.asarray(expected.logits)[prompts.real])


def test_exactly_one_of_ids_and_embeddings(ours):
    with pytest.raises(MessageError, match="exactly one"):
        ours("base")()
    with pytest.raises(MessageError, match="exactly one"):
        ours("base")(input_ids=np.ones((1, 4), int), inputs_embeds=np.ones((1, 4, 64), np.float32))


@pytest.mark.parametrize("shape", [(14,), (1, 14), (3, 1, 14)])
def test_position_ids_are_taken(ours, theirs, shape):
    prompts = Prompts(config_of("base"), [[14]], seed=10)
    positions = np.sort(np.random.RandomState(0).randint(0, 90, (3, 1, 14)), axis=-1)
    positions = positions if len(shape) == 3 else positions[0]
    expected = run(theirs("base"), **to_torch(prompts.inputs | {"position_ids": positions}))
    if len(shape) == 1:
        with pytest.raises(MessageError, match="position_ids"):
            ours("base")(**prompts.inputs, position_ids=positions[0])
        return
    assert_close(ours("base")(**prompts.inputs, position_ids=positions).logits, expected.logits)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rope_deltas_equal(ours, theirs, padding):
    prompts = Prompts(config_of("base"), CASES["rows of text and pictures"], padding=padding, seed=11)
    expected = run(theirs("base"), **to_torch(prompts.inputs))
    found = ours("base")(**prompts.inputs)
    assert np.array_equal(found.rope_deltas, expected.rope_deltas.numpy())
    assert np.array_equal(found.past_key_values.rope_deltas, found.rope_deltas)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows of text and pictures", "rows of videos", "text"])
def test_cached_steps_equal(ours, theirs, case):
    """Token by token after a prompt: the same as the reference's cached steps, and as one pass over everything."""
    import torch

    model, reference = ours("base"), theirs("base")
    prompts = Prompts(config_of("base"), CASES[case], seed=12)
    new = np.array([prompts.text(4) for _ in prompts.input_ids])
    out, expected = model(**prompts.inputs), run(reference, **to_torch(prompts.inputs), use_cache=True)
    steps, mask, past = [], prompts.attention_mask, prompts.input_ids.shape[1]
    for i in range(new.shape[1]):
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        token = new[:, i : i + 1]
        out = model(
            input_ids=token,
            attention_mask=mask,
            past_key_values=out.past_key_values,
            cache_position=np.array([past + i]),
        )
        with torch.no_grad():
            expected = reference(
                input_ids=torch.tensor(token), attention_mask=torch.tensor(mask),
                cache_position=torch.tensor([past + i]), past_key_values=expected.past_key_values,
            )  # fmt: skip
        assert_close(out.logits, expected.logits)
        assert out.past_key_values.get_seq_length() == past + i + 1
        steps.append(out.logits)
    whole = prompts.inputs | {"input_ids": np.concatenate([prompts.input_ids, new], axis=1), "attention_mask": mask}
    assert_close(np.concatenate(steps, axis=1), np.asarray(model(**whole).logits)[:, -4:])


def test_cached_chunk_equals(ours, theirs):
    """More than one token at a time after a prompt, in a cache that has to grow for them."""
    model = ours("base")
    prompts = Prompts(config_of("base"), [[9], [2, ("image", (4, 6)), 40]], seed=13)
    first = model(**prompts.inputs)
    new = np.array([prompts.text(30) for _ in range(2)])
    mask = np.concatenate([prompts.attention_mask, np.ones_like(new)], axis=1)
    assert first.past_key_values.cache.capacity < mask.shape[1]
    found = model(input_ids=new, attention_mask=mask, past_key_values=first.past_key_values).logits
    whole = prompts.inputs | {"input_ids": np.concatenate([prompts.input_ids, new], axis=1), "attention_mask": mask}
    expected = run(theirs("base"), **to_torch(whole)).logits[:, -30:]
    assert_close(found, expected)


def test_a_step_heeds_a_mask_that_hides_past_columns(ours, theirs):
    import torch

    prompts = Prompts(config_of("base"), [[14], [9]], seed=17)
    out, expected = ours("base")(**prompts.inputs), run(theirs("base"), **to_torch(prompts.inputs), use_cache=True)
    mask = np.pad(prompts.attention_mask, ((0, 0), (0, 1)), constant_values=1)
    hidden = mask.copy()
    hidden[:, 6:9] = 0
    token = np.array([[5], [9]])
    found, seeing = (
        ours("base")(token, attention_mask=m, past_key_values=out.past_key_values).logits for m in (hidden, mask)
    )
    with torch.no_grad():
        expected = theirs("base")(
            torch.tensor(token), attention_mask=torch.tensor(hidden), past_key_values=expected.past_key_values,
            cache_position=torch.tensor([14]),
        )  # fmt: skip
    assert_close(found, expected.logits)
    assert np.abs(np.asarray(found) - seeing).max() > 1e-2


@pytest.mark.parametrize("kind", ["image", "video", "both"])
def test_a_later_turn_may_bring_its_own_media(ours, theirs, kind):
    """5.x is right here, and equal to one long prompt; 4.57.1 drops the later picture."""
    model, reference = ours("base"), theirs("base")
    later = {
        "image": [2, ("image", (4, 4)), 5], "video": [2, ("video", (2, 2, 4)), 3],
        "both": [1, ("image", (4, 4)), 2, ("video", (2, 2, 2)), 3],
    }[kind]  # fmt: skip
    first = [2, ("image", (4, 6)), 3]
    whole = Prompts(config_of("base"), [first + later], seed=14)
    cut = Prompts(config_of("base"), [first], seed=14).input_ids.shape[1]
    patches = 24
    turn1 = dict(
        input_ids=whole.input_ids[:, :cut], pixel_values=whole.pixel_values[:patches],
        image_grid_thw=whole.image_grid_thw[:1],
    )  # fmt: skip
    turn2 = dict(input_ids=whole.input_ids[:, cut:])
    if len(whole.image_grid_thw) > 1:
        turn2 |= dict(pixel_values=whole.pixel_values[patches:], image_grid_thw=whole.image_grid_thw[1:])
    if whole.video_grid_thw is not None:
        turn2 |= dict(pixel_values_videos=whole.pixel_values_videos, video_grid_thw=whole.video_grid_thw)
    past = model(**turn1).past_key_values
    found = model(**turn2, past_key_values=past)
    expected = run(reference, **their_inputs(reference, whole))
    assert_close(found.logits, expected.logits[:, cut:])
    # Where the next token goes is where it would go after the long prompt.
    token = np.array([whole.text(1)])
    step = model(input_ids=token, past_key_values=found.past_key_values).logits
    longer = np.concatenate([whole.input_ids, token], axis=1)
    whole.input_ids, whole.attention_mask = longer, np.ones_like(longer)
    expected = run(reference, **their_inputs(reference, whole))
    assert_close(step, expected.logits[:, -1:])


def test_a_cache_can_be_continued_twice(ours):
    """It is not consumed: two answers to one prompt start from the same cache."""
    model = ours("base")
    past = model(input_ids=np.arange(1, 15)[None]).past_key_values
    first = model(input_ids=np.array([[5]]), past_key_values=past).logits
    model(input_ids=np.array([[9]]), past_key_values=past)
    assert np.array_equal(first, model(input_ids=np.array([[5]]), past_key_values=past).logits)


def test_cache_position_must_follow_the_cache(ours):
    model = ours("base")
    past = model(input_ids=np.arange(1, 15)[None]).past_key_values
    with pytest.raises(MessageError, match="cache_position"):
        model(input_ids=np.array([[5]]), past_key_values=past, cache_position=np.array([3]))


def test_use_cache_false_gives_none(ours):
    out = ours("base")(input_ids=np.arange(1, 15)[None], use_cache=False)
    assert out.past_key_values is None
    assert out.keys() == ["logits", "rope_deltas"]
    assert np.array_equal(out[0], out["logits"]) and list(out) == out.keys()


def test_return_dict_false_gives_a_tuple(ours):
    ids = np.arange(1, 15)[None]
    out, found = ours("base")(ids), ours("base")(ids, return_dict=False)
    assert type(found) is tuple and len(found) == len(out.keys()) == 3
    assert np.array_equal(found[0], out.logits) and np.array_equal(found[2], out.rope_deltas)
    hidden = ours("base").model(ids, return_dict=False)
    assert type(hidden) is tuple and hidden[0].shape == (1, 14, 64)


def test_another_length_of_a_bucket_compiles_nothing_but_cuts(ours, lowerings):
    """The programs run on padded arrays; only what cuts results to the caller's shape knows that shape."""
    model = ours("base")
    call = dict(output_hidden_states=True, output_attentions=True)

    def ask(rows, number):
        prompts = Prompts(config_of("base"), rows, seed=number)
        return model(**prompts.inputs, labels=np.where(prompts.input_ids < 300, prompts.input_ids, -100), **call)

    ask([[20, ("image", (6, 8)), 4]], 0)
    with lowerings() as lowered:
        out = ask([[7, ("image", (4, 6)), ("image", (4, 4)), 22]], 1)
    assert out.logits.shape[1] == 43
    assert set(lowered) <= {"jit(cut)", "jit(attention_weights)"}
    with lowerings() as lowered:
        ask([[300]], 2)
    assert "jit(forward)" in lowered  # or the names above would tell nothing


def test_dropout_key_reaches_the_vision_part(ours, checkpoints, tmp_path):
    shutil.copytree(checkpoints("base"), tmp_path, dirs_exist_ok=True)
    config = json.loads(json.dumps(CONFIGS["base"]))
    config["vision_config"]["attention_dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, key = Glm4vForConditionalGeneration.from_pretrained(tmp_path), jax.random.key(0)
    picture = Prompts(config_of("base"), [[3, ("image", (4, 6)), 4]], seed=18).inputs
    text = Prompts(config_of("base"), [[14]], seed=18).inputs
    plain = ours("base")(**picture).logits
    assert_close(model(**picture).logits, plain)
    dropped = model(**picture, dropout_key=key).logits
    assert np.abs(np.asarray(dropped)[:, 4:] - np.asarray(plain)[:, 4:]).max() > 1e-2
    assert_close(dropped[:, :4], plain[:, :4])  # before the picture
    assert_close(model(**text, dropout_key=key).logits, ours("base")(**text).logits)


def products(jaxpr):
    """Operands (shape, dtype) of every dot_general and convolution, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            yield tuple((x.aval.shape, x.aval.dtype) for x in equation.invars[:2])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_bfloat16_is_multiplied_as_bfloat16(mesh):
    """A float32 array that slips into the forward pass would promote all that follows, and cost most of the speed."""
    config = config_of("base")
    prompts = Prompts(config, [[200, ("image", (16, 20)), ("video", (2, 4, 4))]], seed=19)
    batch, _ = make_batch(config=config, **prompts.inputs)
    short, _ = make_batch(np.arange(14)[None], config)
    text = Glm4vTextModel(config.text_config, dtype=jnp.bfloat16)

    def forward(module, batch, one, cache):
        step = module.language_model(module.language_model.embed_tokens(one), one[None].repeat(3, 0), one, cache)
        return module.logits(module(batch)), module.logits(step[0]), module(short)

    module = jax.eval_shape(lambda: Glm4v.init(config, dtype=jnp.bfloat16))
    one = np.ones((1, 1), np.int32)
    jaxpr = jax.make_jaxpr(forward)(module, batch, one, text.init_cache(1, 64))
    assert all(x.dtype == jnp.bfloat16 for x in jaxpr.out_avals)
    found = list(products(jaxpr.jaxpr))
    assert len(found) > 20
    cells, dim = config.vision_config.position_grid**2, config.vision_config.hidden_size
    table = [pair for pair in found if pair[0][0][-1] == cells and pair[1][0] == (cells, dim)]
    assert len(table) == 1 and all(dtype == np.float32 for _, dtype in table[0])
    others = [pair for pair in found if pair not in table]
    assert [pair for pair in others if any(dtype != jnp.bfloat16 for _, dtype in pair)] == []


def test_vision_features_equal(ours, theirs):
    import torch

    for name in CONFIGS:
        rows = [[("image", (4, 6)), ("image", (8, 2)), ("video", (2, 6, 4)), ("video", (1, 2, 2))]]
        prompts = Prompts(config_of(name), rows, seed=15)
        inputs = to_torch(prompts.inputs)
        with torch.no_grad():
            pictures = theirs(name).get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            videos = theirs(name).get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        model = ours(name)
        found = model.get_image_features(prompts.pixel_values, prompts.image_grid_thw)
        found += model.get_video_features(prompts.pixel_values_videos, prompts.video_grid_thw)
        for one, other in zip(found, (*pictures, *videos), strict=True):
            assert_close(one, other)


def test_parts_of_the_model_stand_alone(ours, theirs):
    """`Glm4vModel`, `Glm4vTextModel` and `Glm4vVisionModel`, as the reference offers them."""
    import torch

    model, reference = ours("base"), theirs("base")
    prompts = Prompts(config_of("base"), [[5], [3, ("image", (4, 6)), 4]], seed=16)
    inputs = to_torch(prompts.inputs)
    expected = run(reference, **inputs, output_hidden_states=True).hidden_states[-1]
    assert isinstance(model.model, Glm4vModel)
    assert_close(model.model(**prompts.inputs).last_hidden_state, expected, prompts.real)

    assert isinstance(model.visual, Glm4vVisionModel)
    with torch.no_grad():
        features = reference.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    assert_close(model.visual(prompts.pixel_values, prompts.image_grid_thw), features)

    assert isinstance(model.language_model, Glm4vTextModel)
    ids = np.array([prompts.text(9)])
    with torch.no_grad():
        hidden = reference.model.language_model(input_ids=torch.tensor(ids)).last_hidden_state
    assert_close(model.language_model(input_ids=ids).last_hidden_state, hidden)
    for positions in (np.arange(9)[None], np.broadcast_to(np.arange(9), (3, 1, 9))):
        given = model.language_model(input_ids=ids, position_ids=positions).last_hidden_state
        assert_close(given, hidden)


TWO_BY_TWO = np.array([[1, 2, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.language_model(np.array([[1, 320]])), "input_ids: found token 320; expected tokens from 0 to 319"),
        (lambda m: m.language_model(np.array([[-1, 1]])), "input_ids: found token -1"),
        (lambda m: m.model.get_input_embeddings(np.array([[1, 320]])), "input_ids: found token 320"),
        (
            lambda m: m.language_model(np.ones((1, 14), int), position_ids=np.ones((1, 3), int)),
            r"position_ids: found shape \[1, 3\]; expected \[3, 1, 14\]",
        ),
        (
            lambda m: m.language_model(np.ones((1, 14), int), position_ids=np.ones((3,), int)),
            r"position_ids: found shape \[3\]; expected \[3, 1, 14\]",
        ),
        (
            lambda m: m.language_model(np.ones((1, 14), int), position_ids=np.full((1, 14), 0.5)),
            "position_ids: found float64; expected integers",
        ),
        (lambda m: m.get_image_features(np.zeros((4, 1176)), None), "image_grid_thw: found nothing; expected integers"),
        (lambda m: m.get_video_features(np.zeros((4, 1176)), None), "video_grid_thw: found nothing; expected integers"),
        (
            lambda m: m.get_image_features(np.zeros((5, 1176)), TWO_BY_TWO),
            r"pixel_values: found shape \[5, 1176\]; expected \[4, 1176\], as image_grid_thw counts",
        ),
        (lambda m: m.get_video_features(np.zeros((5, 1176)), TWO_BY_TWO), "pixel_values_videos: found shape"),
        (
            lambda m: m.visual(np.zeros((4, 100)), TWO_BY_TWO),
            r"hidden_states: found shape \[4, 100\]; expected \[4, 11",
        ),
        (lambda m: m.visual(None, TWO_BY_TWO), r"hidden_states: found shape \[\]"),
        (
            lambda m: m.visual(np.zeros((4, 1176)), [1, 2, 2]),
            r"grid_thw: found int64 \[3\]; expected integers \[N, 3\]",
        ),
        (lambda m: m.visual(np.zeros((4, 1176)), [[1.0, 2, 2]]), r"grid_thw: found float64 \[1, 3\]"),
        (
            lambda m: m.visual(np.zeros((6, 1176)), [[1, 2, 3]]),
            r"grid_thw: found the grid \[1, 2, 3\]; .* of 2 patches",
        ),
        (lambda m: m.visual(np.zeros((4, 1176)), [[-1, -2, 2]]), r"grid_thw: found the grid \[-1, -2, 2\]"),
        (lambda m: m.visual(np.zeros((0, 1176)), np.zeros((0, 3), int)), "grid_thw: found no grids"),
    ],
)
def test_parts_of_the_model_name_what_is_wrong(ours, call, message):
    with pytest.raises(MessageError, match=message):
        call(ours("base"))


@pytest.mark.slow
def test_fresh_models_are_made_from_a_seed(mesh):
    config, ids = config_of("tester"), np.arange(10, 24)[None]
    models = [Glm4vForConditionalGeneration(config, seed=seed) for seed in (3, 3, 4)]
    one, two, other = (model(input_ids=ids).logits for model in models)
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    # What checkpoints are read into without making any of it first: the same tree, abstract, with its shardings.
    abstract, real = jax.eval_shape(lambda: Glm4v.init(config)), models[0].module
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for leaf, made in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding.spec) == (made.shape, made.dtype, made.sharding.spec)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        ([[3, ("image", (4, 6)), 4]], {"image_grid_thw": None}, "image_grid_thw"),
        ([[3, ("image", (4, 6)), 4]], {"pixel_values": None}, "pixel_values"),
        ([[3, ("image", (4, 6)), 4]], {"pixel_values": np.zeros((23, 1176), np.float32)}, "pixel_values"),
        ([[3, ("image", (4, 6)), 4]], {"image_grid_thw": np.array([[1, 4, 8]])}, "pixel_values"),
        ([[3, ("image", (4, 6)), 4]], {"pixel_values": None, "image_grid_thw": None}, "too few images"),
        (
            [[14]],
            {"pixel_values": np.zeros((4, 1176)), "image_grid_thw": np.array([[1, 2, 2]])},
            "found 1 images; expected 0",
        ),
        ([[14]], {"input_ids": np.array([[1, 2, 320]])}, "token 320"),
        ([[14]], {"input_ids": np.array([[1, 2, -1]])}, "token -1"),
        ([[14]], {"attention_mask": np.zeros((1, 14), int)}, "padding alone"),
        ([[14]], {"input_ids": np.arange(3)}, r"expected integers \[B, T\]"),
    ],
)
def test_contradictory_inputs_are_named(ours, rows, change, message):
    inputs = Prompts(config_of("base"), rows).inputs | change
    if "input_ids" in change:
        del inputs["attention_mask"]
    with pytest.raises(MessageError, match=message):
        ours("base")(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_mask=np.ones((1, 13), int)), r"attention_mask: found shape \[1, 13\]; expected \[1, 14\]$"),
        (dict(attention_mask=np.ones((1, 1, 14, 14), int)), r"attention_mask: found shape \[1, 1, 14, 14\]"),
        (dict(labels=np.full((1, 14), 320)), "labels: found 320; expected -100 or tokens below 320"),
        (dict(labels=np.full((1, 14), -1)), "labels: found -1;"),
        (dict(labels=np.ones((1, 14), np.float32)), "labels: found float32"),
        (dict(labels=np.ones((1, 13), int)), r"labels: found shape \[1, 13\]; expected \[1, 14\]"),
        (dict(labels=np.ones((1, 14), int), logits_to_keep=1), "labels: .* expected .* logits_to_keep=0"),
        (dict(input_ids=[[1, 2], [3]]), "input_ids: found rows of unequal length; .* padding=True"),
        (dict(input_ids=None, inputs_embeds=np.zeros((1, 14, 32))), r"inputs_embeds: .* expected \['B', 'T', 64\]"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(ours, change, message):
    with pytest.raises(MessageError, match=message):
        ours("base")(**{"input_ids": np.arange(1, 15)[None]} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_mask=np.ones((1, 14), int)), r"attention_mask: .* expected \[1, 1\] or \[1, 15\]"),
        (dict(attention_mask=np.ones((1, 1, 1, 15), int)), r"attention_mask: found shape \[1, 1, 1, 15\]"),
        (dict(input_ids=np.array([[5], [6]])), "past_key_values: found 1 row; expected 2"),
    ],
)
def test_steps_that_do_not_fit_their_cache_are_named(ours, change, message):
    past = ours("base")(input_ids=np.arange(1, 15)[None]).past_key_values
    with pytest.raises(MessageError, match=message):
        ours("base")(**{"input_ids": np.array([[5]]), "past_key_values": past} | change)
