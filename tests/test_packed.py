"""Packed models: the same bits, held once, wherever a model is taken.

The fused kernel needs a GPU. Here its place is taken by functions of the same
signature, so that all that leads to it, and from it, runs.
"""

import dataclasses
import functools
import gc
import pathlib

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import ffjax
import pallas_kernels
from ffjax import (
  decode,
  device_memory,
  generate,
  implementation,
  packed,
  packing,
  params,
  rope,
  scoring,
)
from ffjax.errors import RequestError
from ffjax.sampling import choose
from pallas_kernels import emulator, steps
from pallas_kernels.plan import operand_shapes

_ROOT = pathlib.Path(__file__).parents[1]
_CHECKPOINT = _ROOT / "checkpoints" / "tiny_llama"
PROMPTS = [[5, 9, 11, 70], [7] * 9, [1]]

# Sizes that fill whole units and chunks, and sizes that do not.
CONFIGS = {
  "even": dict(
    vocab_size=384,
    hidden_size=1024,
    intermediate_size=1024,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
  ),
  "odd": dict(
    vocab_size=391,
    hidden_size=1100,
    intermediate_size=150,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    num_hidden_layers=3,
  ),
  "head_128": dict(
    vocab_size=77,
    hidden_size=136,
    intermediate_size=40,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=True,
  ),
}


shows_memory = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason="on a CPU, this JAX widens whole bfloat16 operands of loops",
)


@pytest.fixture(params=CONFIGS)
def config(request, make_config):
  return make_config(**CONFIGS[request.param])


@functools.cache
def random_tree(config, factor):
  rng = np.random.default_rng(1)
  flat = {}
  for leaf in params.leaves(config):
    normal = rng.standard_normal(leaf.shape, np.float32)
    is_norm = leaf.path in packed.NORM_PATHS
    weights = 1 + 0.1 * normal if is_norm else 0.02 * normal
    flat[leaf.path] = (factor * weights).astype(jnp.bfloat16)
  return flax.traverse_util.unflatten_dict(flat)


def random_model(config, factor=1):
  """As `ffjax.random_model`, but compiles nothing."""
  tree = jax.tree.map(jnp.asarray, random_tree(config, factor))
  return ffjax.Model(params=tree, config=config)


def sharpened(config):
  """A random model whose choices are not near ties."""
  return random_model(config, factor=4)


def copied(model):
  """A model with arrays of its own, for `pack` to consume."""
  return model.replace(params=jax.tree.map(jnp.copy, model.params))


def on_host(model):
  return model.replace(params=jax.tree.map(np.asarray, model.params))


def with_norm_dtypes(model, dtypes):
  flat = flax.traverse_util.flatten_dict(model.params)
  for path, dtype in zip(packed.NORM_PATHS, dtypes, strict=True):
    flat[path] = flat[path].astype(dtype)
  return model.replace(params=flax.traverse_util.unflatten_dict(flat))


def assert_same_bits(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert x.tobytes() == y.tobytes()


# ---- packing and unpacking -------------------------------------------------


@pytest.mark.parametrize("num_ctas", [1, 7])
def test_unpack_undoes_pack_and_both_consume(config, num_ctas):
  model = with_norm_dtypes(
    random_model(config), ("float32", "float16", "bfloat16")
  )
  expected = on_host(copied(model))
  one = ffjax.pack(model, num_ctas=num_ctas)
  assert all(x.is_deleted() for x in jax.tree.leaves(model.params))
  assert one.params.num_ctas == num_ctas
  assert (one.params.embedding is None) == config.tie_word_embeddings
  assert ffjax.pack(one) is one

  for path, leaf in flax.traverse_util.flatten_dict(expected.params).items():
    assert one.leaf_dtype(path) == leaf.dtype
  two = ffjax.unpack(one)
  assert all(x.is_deleted() for x in jax.tree.leaves(one.params))
  assert_same_bits(two.params, expected.params)
  assert ffjax.unpack(two) is two


def test_all_weights_are_in_the_form_that_the_kernel_takes(config):
  model = ffjax.pack(random_model(config), num_ctas=5)
  plan = implementation.make_plan(packed.geometry_of(config), 2, 64, 5)
  shapes = operand_shapes(plan)
  for name, array in model.params.operands().items():
    wanted = name if name in shapes else f"w_{name}"
    if name == "norms":
      # As activations in shared memory: 8 segments, one below the other.
      array = array.reshape(len(array), 8, -1)
    assert (array.shape, array.dtype) == shapes[wanted], name
  norms = np.asarray(model.params.norms)
  assert (norms[:, config.hidden_size :] == 0).all()


def test_host_arrays_are_packed_and_left_alone(config):
  model = random_model(config)
  host = on_host(model)
  expected = ffjax.pack(copied(model), num_ctas=3)
  assert_same_bits(ffjax.pack(host, num_ctas=3).params, expected.params)
  assert_same_bits(host.params, model.params)


def test_one_array_may_be_embedding_and_head(make_config):
  config = make_config(**CONFIGS["odd"])
  model = random_model(config)
  tree = {**model.params, "lm_head": model.params["embed_tokens"]}
  one = ffjax.pack(model.replace(params=tree), num_ctas=2)
  assert_same_bits(one.params.embedding, one.params.lm_head)
  assert model.params["embed_tokens"]["weight"].is_deleted()


def num_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes_of(config, format_name=None):
  """Returns the leaves of a model by path, without making any."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(device_memory, "free_bytes", lambda _: None)
    model = jax.eval_shape(
      lambda: ffjax.random_model(config, format_name=format_name).params
    )
  return flax.traverse_util.flatten_dict(model)


def test_there_are_never_two_copies(make_config, monkeypatch):
  model = random_model(make_config(**CONFIGS["even"]))
  gc.collect()
  model_bytes = sum(x.nbytes for x in jax.tree.leaves(model.params))
  begin = sum(x.nbytes for x in jax.live_arrays())
  live = []

  def watch(name):
    function = getattr(packing, name)

    def watched(*args, **kwargs):
      made = jax.block_until_ready(function(*args, **kwargs))
      live.append(sum(x.nbytes for x in jax.live_arrays()) - begin)
      return made

    monkeypatch.setattr(packing, name, watched)

  watch("_pack_group")
  watch("_unpack_group")
  one = ffjax.pack(model, num_ctas=4)
  largest = one.params.gate_up.nbytes
  padding = sum(x.nbytes for x in jax.tree.leaves(one.params)) - model_bytes
  assert len(live) == 6
  assert largest <= max(live) <= largest + padding < model_bytes / 2
  live.clear()
  two = ffjax.unpack(one)
  assert len(live) == 6
  assert largest <= max(live) <= largest + padding
  assert sum(x.nbytes for x in jax.live_arrays()) == begin
  del two


def test_host_arrays_come_layer_by_layer(make_config):
  config = make_config(**CONFIGS["even"], num_hidden_layers=8)
  host = on_host(random_model(config))
  gc.collect()
  begin = sum(x.nbytes for x in jax.live_arrays())
  found = []
  pack_layer = packing._pack_layer

  def watched(made, sources, *args, **kwargs):
    assert not any(isinstance(x, jax.Array) for x in sources)
    found.append(sum(x.nbytes for x in sources))
    return pack_layer(made, sources, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packing, "_pack_layer", watched)
    one = ffjax.pack(host, num_ctas=2)
  assert len(found) == 4 * 8
  assert max(found) == 2 * 2 * 1024 * 1024
  packed_bytes = sum(x.nbytes for x in jax.tree.leaves(one.params))
  assert sum(x.nbytes for x in jax.live_arrays()) == begin + packed_bytes


@shows_memory
@pytest.mark.parametrize(
  ("preset", "format_name"),
  [
    ("llama-3.2-1b", None),
    ("llama-3.2-1b", "int8"),
    ("llama-3.1-70b", "int4_g128"),
    ("llama-3.1-70b", "int4_g32_asym"),
  ],
)
def test_a_layer_goes_to_its_place_with_no_copy_of_the_group(
  preset, format_name
):
  config = ffjax.preset(preset)
  sources = {
    name: tuple(shapes_of(config, format_name)[path] for path in paths)
    for name, paths in packed.groups(config).items()
  }
  layer = jax.ShapeDtypeStruct((), jnp.int32)
  num_layers = config.num_hidden_layers
  for name in packed.LAYER_GROUPS:
    matrix = sources[name][0]
    made = packing.packed_shapes(sources[name], config, name, 132)
    group = packing._Group(
      *(config, name, ("bfloat16",) * 3),
      matrix.format if format_name else None,
      packed.chunk_format_of(matrix),
    )
    lowered = (
      packing._pack_layer.lower(
        made, sources[name], layer, config=config, name=name, num_ctas=132
      ),
      packing._unpack_layer.lower(sources[name], made, layer, group),
    )
    for one, target in zip(lowered, (made, sources[name]), strict=True):
      memory = one.compile().memory_analysis()
      assert memory.alias_size_in_bytes == num_bytes(target)
      # As `_extra_bytes` has it.
      most = 3 * max(num_bytes(made), num_bytes(sources[name])) // num_layers
      assert memory.temp_size_in_bytes <= most, name
  for name in ("lm_head", "embedding", "norms"):
    if name in sources:
      whole = packing._pack_whole.lower(sources[name], config, name, 132)
      assert whole.compile().memory_analysis().temp_size_in_bytes < 2**20


def test_memory_in_pieces_is_an_error_that_says_so(make_config, monkeypatch):
  model = random_model(make_config(**CONFIGS["head_128"]))
  paths = packed.groups(model.config)["gate_up"]
  flat = flax.traverse_util.flatten_dict(model.params)
  sources = tuple(flat[path] for path in paths)
  largest = packing.packed_shapes(sources, model.config, "gate_up", 2).size
  zeros = jnp.zeros

  def in_pieces(shape, dtype=None):
    if np.prod(shape) < largest:
      return zeros(shape, dtype)
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(jnp, "zeros", in_pieces)
  with pytest.raises(RequestError, match="packing takes an array of .* pieces"):
    ffjax.pack(model, num_ctas=2)
  # The largest group comes first, so that nothing is lost.
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))

  def broken(shape, dtype=None):
    if shape == ():
      return zeros(shape)
    raise jax.errors.JaxRuntimeError("INTERNAL: broken")

  monkeypatch.setattr(jnp, "zeros", broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
    ffjax.pack(model, num_ctas=2)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_not_taken_is_joined(monkeypatch, fails):
  made = []

  class Growing:
    platform = "gpu"

    def memory_stats(self):
      taken = sum(x.size for x in made)
      return dict(bytes_limit=5 * 2**20 + 3, bytes_in_use=0, pool_bytes=taken)

  zeros = jnp.zeros

  def watched(shape, dtype):
    if fails:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    made.append(zeros(shape, dtype))
    return made[-1]

  monkeypatch.setattr(device_memory, "default_device", Growing)
  monkeypatch.setattr(jnp, "zeros", watched)
  for _ in range(2):
    device_memory.join_pieces()
    assert [x.nbytes for x in made] == ([] if fails else [5 * 2**20])
    assert all(x.is_deleted() for x in made)


def test_there_is_nothing_to_join_on_a_cpu(monkeypatch):
  device = jax.devices("cpu")[0]
  monkeypatch.setattr(device_memory, "default_device", lambda: device)
  monkeypatch.setattr(jnp, "zeros", None)
  device_memory.join_pieces()


# ---- the reference ---------------------------------------------------------


def padded(prompts):
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  token_ids = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(token_ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  return token_ids, lengths


def pieces(model):
  """What the functions that take a model say of one."""
  sampling = decode.Sampling(temperature=1.1, repetition_penalty=1.2)
  state = decode.prefill(model, *padded(PROMPTS), sampling, capacity=64)
  first = jax.tree.map(np.asarray, state.replace(keys=None))
  state = decode.decode_step(model, state, sampling)
  return (
    first,
    state.replace(keys=None),
    scoring.token_nll(model, *padded(PROMPTS)),
  )


@pytest.mark.parametrize("name", ["odd", "head_128"])
def test_reference_gives_the_same_bits(make_config, name):
  config = make_config(**CONFIGS[name])
  model = sharpened(config)
  expected = pieces(model)
  assert np.asarray(expected[-1]).std() > 1
  assert_same_bits(pieces(ffjax.pack(model, num_ctas=4)), expected)


def test_tiny_llama_goes_on_as_before():
  model = ffjax.load(_CHECKPOINT)
  texts = ["And the LORD said unto ", "In the beginning "]

  def run(model):
    return (
      decode.generate(model, texts, 12).texts,
      decode.compare(model, [text[:5] for text in texts], max_new_tokens=0),
      (model.dtype, model.bytes_per_step(3, 10.0)),
    )

  expected = run(model)
  assert run(ffjax.pack(model, num_ctas=4)) == expected


@pytest.mark.parametrize("vocab_size", [391, 384])
def test_lm_head_in_blocks(make_config, monkeypatch, vocab_size):
  """Three blocks and a rest, or three blocks, against one product."""
  config = make_config(**{**CONFIGS["odd"], "vocab_size": vocab_size})
  model = sharpened(config)
  hidden = jax.random.normal(jax.random.key(0), (2, 5, 1100), jnp.bfloat16)
  expected = implementation.reference_logits(model, hidden)
  model = ffjax.pack(model, num_ctas=4)
  monkeypatch.setattr(packed, "_BLOCK_BYTES", 128 * 2048 * 2)
  found = implementation.reference_logits(model, hidden)
  chex.assert_trees_all_close(found, expected, atol=1e-5)


@functools.cache
def temporary_bytes(config):
  """Temporary memory of prefill and of the loop over steps, and the model's."""
  flat = shapes_of(config)
  fields = {"embedding": None}
  for name, paths in packed.groups(config).items():
    sources = tuple(flat[path] for path in paths)
    fields[name] = packing.packed_shapes(sources, config, name, 4)
  model = ffjax.Model(
    params=packed.PackedParams(**fields, norm_dtypes=("bfloat16",) * 3),
    config=config,
  )
  first = decode.prefill.lower(
    model,
    jax.ShapeDtypeStruct((1, 16), jnp.int32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    capacity=64,
  )
  rest = decode.decode_steps.lower(model, first.out_info, 8, max_steps=8)
  sizes = [
    lowered.compile().memory_analysis().temp_size_in_bytes
    for lowered in (first, rest)
  ]
  return sizes, model.weight_bytes_per_step()


@shows_memory
@pytest.mark.parametrize(
  "fields", [{"num_hidden_layers": 64}, {"vocab_size": 64 * 1024}]
)
def test_reference_makes_no_second_copy(make_config, monkeypatch, fields):
  monkeypatch.setattr(packed, "_BLOCK_BYTES", 2**20)
  sizes, model_bytes = temporary_bytes(
    make_config(**{**CONFIGS["even"], **fields})
  )
  assert model_bytes > 3e7
  assert max(sizes) < model_bytes / 4


@pytest.mark.parametrize("max_shard_bytes", [2 * 10**9, 10**5])
def test_save_writes_the_same_files(config, tmp_path, max_shard_bytes):
  model = with_norm_dtypes(
    random_model(config), ("bfloat16", "float32", "bfloat16")
  )
  ffjax.save(model, tmp_path / "tree", max_shard_bytes)
  model = ffjax.pack(model, num_ctas=4)
  ffjax.save(model, tmp_path / "packed", max_shard_bytes)
  names = sorted(path.name for path in (tmp_path / "tree").iterdir())
  assert len(names) > (2 if max_shard_bytes < 10**6 else 1)
  assert names == sorted(x.name for x in (tmp_path / "packed").iterdir())
  for name in names:
    ours, theirs = (tmp_path / x / name for x in ("packed", "tree"))
    assert ours.read_bytes() == theirs.read_bytes(), name


def test_sizes_do_not_count_padding(config):
  model = with_norm_dtypes(
    random_model(config), ("float32", "bfloat16", "bfloat16")
  )
  expected = [model.weight_bytes_per_step(batch) for batch in (1, 3)]
  norm_bytes = config.num_hidden_layers * config.hidden_size * 2
  assert expected[1] == config.weight_bytes_per_step(2, 3) + norm_bytes
  model = ffjax.pack(model, num_ctas=4)
  assert model.dtype == jnp.bfloat16
  assert [model.weight_bytes_per_step(b) for b in (1, 3)] == expected


# ---- what is refused -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What JAX says of a GPU."""

  compute_capability: str = "9.0"
  core_count: int = 132
  device_kind: str = "a GPU"
  platform: str = "gpu"

  def memory_stats(self):
    return None

  def __str__(self):
    return "cuda:0"


@pytest.fixture
def hopper(monkeypatch):
  """Makes ffjax believe in a Hopper GPU and a JAX that knows it."""
  monkeypatch.setattr(device_memory, "default_device", Gpu)
  monkeypatch.setattr(
    implementation, "_machine_lacks", lambda: None, raising=True
  )
  yield
  # What was traced with a substitute for the kernel.
  jax.clear_caches()


@pytest.mark.parametrize(
  ("fields", "dtype", "message"),
  [
    ({"head_dim": 32}, "bfloat16", r"head_dim=32 \(it takes 64 and 128\)"),
    ({"num_attention_heads": 18}, "bfloat16", "9 query heads per KV head"),
    ({"hidden_size": 8256}, "bfloat16", "hidden_size=8256 .* at most 8192"),
    ({"attention_bias": True}, "bfloat16", "biases, and attention_bias is"),
    ({"mlp_bias": True}, "bfloat16", "biases, and mlp_bias is true"),
    ({}, "float32", "float32 matrices: load .* dtype='bfloat16'"),
    ({}, "float16", "float16 matrices"),
  ],
)
def test_models_that_are_refused(make_config, hopper, fields, dtype, message):
  config = make_config(
    **{**CONFIGS["even"], "num_hidden_layers": 1, "vocab_size": 8, **fields}
  )
  model = ffjax.random_model(config, dtype=dtype)
  with pytest.raises(RequestError, match=f"cannot be packed: .*{message}"):
    ffjax.pack(model, num_ctas=4)
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))
  with pytest.raises(RequestError, match=f"'fused' cannot run: .*{message}"):
    decode.generate(model, [1], 1, implementation="fused")
  assert implementation.resolve("auto", model).name == "reference"
  assert not implementation.wants_packed("auto", model)
  with pytest.raises(RequestError, match=f"'fused' cannot run: .*{message}"):
    implementation.wants_packed("fused", model)


def test_numbers_of_ctas(make_config, monkeypatch):
  config = make_config(**CONFIGS["head_128"])
  model = random_model(config)
  for num_ctas, message in (
    (None, "num_ctas must be given: the default device, .*, is not a GPU"),
    (0, "num_ctas=0 must be at least 1"),
    (2.5, "num_ctas=2.5 is not an integer"),
  ):
    with pytest.raises(RequestError, match=message):
      ffjax.pack(model, num_ctas=num_ctas)
  monkeypatch.setattr(device_memory, "default_device", Gpu)
  with pytest.raises(
    RequestError, match="num_ctas=133 is more than .* 132 SMs"
  ):
    ffjax.pack(model, num_ctas=133)
  model = ffjax.pack(model)
  assert model.params.num_ctas == 132
  assert ffjax.pack(model, num_ctas=132) is model
  with pytest.raises(RequestError, match="packed for 132 CTAs already: unpack"):
    ffjax.pack(model, num_ctas=131)


def test_packing_that_does_not_fit_leaves_the_model(make_config, monkeypatch):
  model = random_model(make_config(**CONFIGS["even"]))
  group = 2 * 2 * 1024 * 1024 * 2
  # And what packing a layer of it takes.
  needed = group + 3 * group // 2
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: needed - 1)
  with pytest.raises(RequestError, match="packing: .* takes"):
    ffjax.pack(model, num_ctas=2)
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: needed)
  model = ffjax.pack(model, num_ctas=2)
  assert model.params.gate_up.nbytes == group
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: needed - 1)
  with pytest.raises(RequestError, match="unpacking: .* takes"):
    ffjax.unpack(model)
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: needed)
  ffjax.unpack(model)


def test_padding_counts_when_packing_has_to_fit(make_config, monkeypatch):
  model = random_model(make_config(**CONFIGS["odd"]))
  sources = sum(x.nbytes for x in jax.tree.leaves(model.params))
  packed = jax.tree.map(jnp.copy, model)
  packed = ffjax.pack(packed, num_ctas=132)
  grown = sum(x.nbytes for x in jax.tree.leaves(packed.params)) - sources
  assert grown > 0
  # At the end, that much more is there than before.
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: grown - 1)
  with pytest.raises(RequestError, match="packing: .* padding takes"):
    ffjax.pack(model, num_ctas=132)
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))


def test_what_is_missing_here_is_all_said(make_config, monkeypatch):
  model = random_model(make_config(**CONFIGS["head_128"]))

  def missing():
    with pytest.raises(RequestError, match="'fused' cannot run") as caught:
      decode.generate(model, [1], 1, implementation="fused")
    return str(caught.value)

  device, pack = "compute capability 9.0", "model = ffjax.pack(model)"
  assert device in missing()
  assert pack in missing()
  model = ffjax.pack(model, num_ctas=4)
  assert device in missing()
  assert pack not in missing()
  assert implementation.resolve("auto", model).name == "reference"
  older = functools.partial(Gpu, compute_capability="8.0", core_count=3)
  monkeypatch.setattr(device_memory, "default_device", older)
  assert f"{device} (Hopper), and JAX's default device is a GPU" in missing()
  assert "packed for 4 CTAs, and cuda:0 has 3 SMs" in missing()


def test_requests_that_the_kernel_cannot_take(make_config, hopper):
  model = ffjax.pack(
    random_model(make_config(**CONFIGS["head_128"])), num_ctas=4
  )
  assert implementation.resolve("auto", model).name == "fused"
  nine = [[1, 2]] * 9
  for function in (decode.generate, decode.stream, decode.warm_up):
    with pytest.raises(RequestError, match="does not take batch 9"):
      function(model, nine, 1, implementation="fused")
  names = ("reference", "fused")
  with pytest.raises(RequestError, match="does not take batch 9"):
    decode.compare(model, nine, names)
  # "auto" takes what there is.
  assert len(decode.generate(model, nine, 2).token_ids) == 9
  names = ("reference", "auto")
  same = decode.compare(model, nine, names, max_new_tokens=0)
  assert same.implementations == ("reference", "reference")

  for capacity, dtype, message in (
    (6, jnp.bfloat16, r"capacity 6 \(it takes multiples of 64\)"),
    (64, jnp.float32, "a cache in float32"),
  ):
    cache = decode.KVCache.create(model.config, 1, capacity, dtype)
    arguments = (model, np.asarray([[1, 2]]), np.asarray([2]))
    with pytest.raises(RequestError, match=message):
      decode.prefill(*arguments, cache=cache, implementation="fused")
    state = decode.prefill(*arguments, cache=cache, implementation="auto")
    with pytest.raises(RequestError, match=message):
      decode.decode_step(model, state, implementation="fused")
    decode.decode_step(model, state, implementation="auto")


# ---- the seam to the kernel ------------------------------------------------


def install(monkeypatch, step):
  """Puts a function in the kernel's place."""

  class Kernel:
    pass

  Kernel.step = staticmethod(step)
  Kernel.launch = staticmethod(launch_of(step))
  monkeypatch.setattr(pallas_kernels, "kernel", Kernel, raising=False)


def launch_of(step):
  """Returns what takes a step as the kernel does, one launch after another."""

  def launch(plan, operands, *, eos_token_ids, with_logits):
    assert not with_logits
    num_rows, b = len(operands["emitted"]), plan.batch
    for name, (shape, dtype) in operand_shapes(plan, num_rows).items():
      chex.assert_shape(operands[name], shape)
      chex.assert_type(operands[name], dtype)
    progress = operands["progress"]
    token_ids, positions, active, _ = progress[:, :b]
    now, most = progress[3, 0], progress[3, 1]
    weights = {name.removeprefix("w_"): x for name, x in operands.items()}
    weights["norms"] = weights["norms"].reshape(len(weights["norms"]), -1)
    wanted = ("qkv", "o", "gate_up", "down", "lm_head", "embedding", "norms")
    logits, chosen, k, v = step(
      plan,
      {name: weights[name] for name in wanted},
      token_ids,
      positions,
      active > 0,
      *operands["angles"][now, :, :b],
      operands["k_cache"],
      operands["v_cache"],
    )
    sequences = steps.advance(
      token_ids, positions, active, chosen, plan.capacity, eos_token_ids
    )
    emitted = jnp.where(active > 0, chosen, -1)
    changed = dict(
      progress=progress.at[:3, :b].set(jnp.stack(sequences)).at[3, 0].add(1),
      emitted=operands["emitted"].at[now, :b].set(emitted),
      words=operands["words"] + 1,
      k_cache=k,
      v_cache=v,
    )
    goes_on = (active > 0).any() & (now < most)
    return logits, {
      name: jnp.where(goes_on, x, operands[name]) for name, x in changed.items()
    }

  return launch


def reference_in_its_place(config, greedy_ids):
  """Returns a step with the kernel's signature that runs the reference."""

  def step(plan, weights, token_ids, positions, active, cos, sin, k, v):
    b = plan.batch
    chex.assert_shape([token_ids, positions, active], (b,))
    chex.assert_type([token_ids, positions, active], [jnp.int32] * 2 + [bool])
    chex.assert_shape([cos, sin], (b, config.head_dim // 2))
    assert k.shape[3] == plan.capacity
    right = jnp.stack(rope.cos_sin(config, positions)) - jnp.stack([cos, sin])
    right = jnp.all((jnp.abs(right) < 1e-6) | ~active[None, :, None])
    tied = config.tie_word_embeddings
    tree = packed.PackedParams(
      **{**weights, "embedding": None if tied else weights["embedding"]},
      norm_dtypes=("float32",) * 3,
    )
    cache = decode.KVCache(k=k, v=v, lengths=positions)
    hidden, cache = packed.hidden_states(
      tree, config, token_ids[:, None], active.astype(jnp.int32), cache
    )
    logits = packed.logits(tree, config, hidden[:, 0])
    logits = jnp.where(right, logits, jnp.nan)
    return logits, greedy_ids(logits), cache.k, cache.v

  return step


def test_fused_runs_by_way_of_the_kernel(make_config, hopper, monkeypatch):
  config = make_config(**CONFIGS["odd"])
  model = ffjax.pack(sharpened(config), num_ctas=4)
  expected = decode.generate(model, PROMPTS, 9, implementation="reference")
  calls = []

  def largest(logits):
    calls.append(logits.shape)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  install(monkeypatch, reference_in_its_place(config, largest))
  found = decode.generate(model, PROMPTS, 9)
  assert calls == [(3, config.vocab_size)]
  assert found.token_ids == expected.token_ids
  same = decode.compare(
    model, PROMPTS[:2], ("reference", "fused"), max_new_tokens=0
  )
  assert same.implementations == ("reference", "fused")
  assert same.max_logit_error == 0


@pytest.mark.parametrize("stop_on_eos", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 4, 7, 12, 20])
def test_greedy_launches_give_what_the_loop_does(
  make_config, hopper, monkeypatch, num_steps, stop_on_eos
):
  monkeypatch.setattr(steps, "LAUNCHES_PER_LOOK", 4)
  # Every third token ends a sequence.
  config = make_config(**CONFIGS["odd"], eos_token_ids=tuple(range(0, 391, 3)))
  model = ffjax.pack(sharpened(config), num_ctas=4)
  install(
    monkeypatch,
    reference_in_its_place(
      config, lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32)
    ),
  )
  # The first cache is full after four steps; the second has ended before.
  prompts = [[5, 9, 11, 70] * 15, [7] * 9, [1], [3, 4]]

  def run(name):
    state = decode.prefill(
      model, *padded(prompts), capacity=64, stop_on_eos=False
    )
    finished = jnp.asarray([False, True, False, False])
    return decode.decode_steps(
      model,
      state.replace(finished=finished, keys=None),
      num_steps,
      max_steps=17,
      implementation=name,
      stop_on_eos=stop_on_eos,
    )

  ours, theirs = run("fused"), run("reference")
  chex.assert_trees_all_close(ours[0].cache.k, theirs[0].cache.k, atol=0.05)
  ours, theirs = (
    (x.cache.lengths, x.token_ids, x.finished, tokens)
    for x, tokens in (ours, theirs)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  emitted = (np.asarray(theirs[-1]) >= 0).sum(1).tolist()
  if stop_on_eos:
    assert num_steps < 12 or len(set(emitted)) > 2
  else:
    assert emitted == [
      min(num_steps, 4),
      0,
      min(num_steps, 17),
      min(num_steps, 17),
    ]


def test_choice_of_the_kernel_is_taken_if_greedy(
  make_config, hopper, monkeypatch
):
  config = make_config(**CONFIGS["head_128"])
  model = ffjax.pack(sharpened(config), num_ctas=4)
  install(
    monkeypatch,
    reference_in_its_place(config, lambda x: jnp.full(len(x), 42, jnp.int32)),
  )
  # The prompts' last logits are the reference's, and so is the first token.
  for ids in decode.generate(model, PROMPTS, 6).token_ids:
    assert ids[1:] == [42] * 5

  logits = jnp.zeros((2, 50)).at[0, 7].set(99.0).at[1, 8].set(99.0)
  theirs = jnp.asarray([42, 43], jnp.int32)
  seen = jnp.zeros((2, 50), bool)
  for options, expected in (
    ({}, [42, 43]),
    ({"top_k": 3, "min_p": 0.5}, [42, 43]),
    ({"temperature": 0.5}, [7, 8]),
    ({"repetition_penalty": 1.5}, [7, 8]),
  ):
    sampling = decode.Sampling(**options)
    found = choose(logits, sampling, sampling.keys(2), theirs, seen, theirs)
    assert found.tolist() == expected
    found = choose(logits, sampling, sampling.keys(2), theirs, seen)
    assert found.tolist() == [7, 8]


def emulated_step(plan, weights, token_ids, positions, active, cos, sin, k, v):
  """What the kernel computes, by `pallas_kernels.emulator`."""
  angles = cos[None], sin[None]
  operands = steps.operands(
    plan, weights, token_ids, positions, active, *angles, 1, k, v
  )
  operands = {name: np.asarray(x) for name, x in operands.items()}
  trace = emulator.run(plan, operands)
  return (
    jnp.asarray(trace.logits[:, : plan.geometry.vocab_size]),
    jnp.asarray(trace.next_ids),
    jnp.asarray(trace.k_cache),
    jnp.asarray(trace.v_cache),
  )


def test_emulated_kernel_agrees_with_the_reference(config, hopper, monkeypatch):
  """Orders of rows, halves of heads, norms, angles: all must be the kernel's."""
  install(monkeypatch, emulated_step)
  # Sharper, a tie in attention could outweigh all else.
  assert_fused_agrees(ffjax.pack(random_model(config, factor=2), num_ctas=4))


def assert_fused_agrees(model):
  """Compares steps of a packed model, whatever is in the kernel's place."""
  config = model.config
  exact = decode.KVCache.create(config, 2, 64, np.float32)
  ours = theirs = decode.KVCache.create(config, 2, 64, jnp.bfloat16)
  fused = implementation.resolve("fused", model, ours).step
  reference = jax.jit(implementation.resolve("reference").step)
  tokens = np.asarray([[5, 9, 11, 70, 3], [7, 2, 0, 0, 76]], np.int32)
  # The first token by the reference: angles must be from the same origin.
  first = (model, np.asarray([1, 4], np.int32), jnp.asarray([True, True]))
  ours = theirs = reference(*first, theirs).cache
  exact = reference(*first, exact).cache
  for t, active in enumerate([(True, True)] * 2 + [(True, False)] * 3):
    arguments = (model, tokens[:, t], jnp.asarray(active))
    a = fused(*arguments, ours)
    b = reference(*arguments, theirs)
    c = reference(*arguments, exact)
    ours, theirs, exact = a.cache, b.cache, c.cache
    live = np.flatnonzero(active)
    truth = np.asarray(c.logits)[live]
    scale = np.sqrt(np.mean(truth**2))

    def error(out, live=live, truth=truth):
      return np.sqrt(np.mean((np.asarray(out.logits)[live] - truth) ** 2))

    assert error(a) < 2 * error(b) < 0.1 * scale
    np.testing.assert_array_equal(
      np.asarray(a.greedy_ids)[live], np.argmax(a.logits, axis=-1)[live]
    )
  np.testing.assert_array_equal(ours.lengths, [6, 3])
  np.testing.assert_array_equal(theirs.lengths, [6, 3])


# ---- the command line ------------------------------------------------------


def run_main(capsys, **values):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["generate"])
  values = {"checkpoint": str(_CHECKPOINT), "prompt": "And the LORD", **values}
  with flagsaver.flagsaver(**values):
    code = generate.main(["generate"])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_command_line_packs_where_the_kernel_runs(capsys, hopper, monkeypatch):
  values = dict(max_new_tokens=3)
  _, expected, _ = run_main(capsys, **values, implementation="reference")
  config = ffjax.LlamaConfig.from_json(_CHECKPOINT / "config.json")
  calls = []

  def largest(logits):
    calls.append(logits.shape)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  install(monkeypatch, reference_in_its_place(config, largest))
  code, text, errors = run_main(capsys, **values, implementation="auto")
  assert code == 0, errors
  assert text == expected
  assert calls
  # What the kernel cannot take is left to the reference, or refused.
  calls.clear()
  code, _, errors = run_main(capsys, **values, dtype="float32")
  assert code == 0, errors
  assert not calls
  code, text, errors = run_main(
    capsys, **values, implementation="fused", dtype="float32"
  )
  assert code == 1
  assert errors.startswith("error: implementation='fused' cannot run: the ker")
  assert "float32 matrices" in errors
  # Nothing was loaded.
  assert len(errors.splitlines()) == 1
  assert text == ""
