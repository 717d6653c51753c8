"""Trains the tiny Llama that the repository carries, `tiny_llama/`.

The text is the King James Bible, whose copyright has expired, one verse per
line as Debian's `bible-kjv` prints it:

  apt-get install bible-kjv bible-kjv-text
  echo | bible -f 'gen1:1-rev22:21' > kjv.txt
  pip install '.[train]'
  python checkpoints/train_tiny_llama.py --text=kjv.txt --output=DIR

Every 40th chapter is held out and never trained on; another 40th chooses the
step whose weights are kept. The training log goes to `DIR/training_log.jsonl`,
the held-out chapters to `DIR/heldout.txt`.
"""

import functools
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import ffjax
from ffjax import scoring, text
from ffjax.model import Params, init_params

_TEXT = flags.DEFINE_string("text", None, "Verses, one per line.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Optimizer steps.")
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences per step.")
_PEAK_RATE = flags.DEFINE_float("peak_rate", 3e-3, "Peak learning rate.")
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.2, "AdamW's decay.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and of batches.")

CONFIG = ffjax.LlamaConfig(
  vocab_size=384,
  hidden_size=256,
  intermediate_size=768,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=64,
  max_position_embeddings=1024,
  rope_theta=10000.0,
  tie_word_embeddings=True,
  bos_token_id=1,
  eos_token_ids=(1,),
  dtype="bfloat16",
)


def chapters(verses: str) -> list[str]:
  """Splits verses such as `Ge1:1 In the ...` into chapters of plain text."""
  by_chapter: dict[str, list[str]] = {}
  for line in verses.splitlines():
    match = re.fullmatch(r"(\w+):\d+ (.*)", line)
    if match is None:
      raise app.UsageError(f"--text: not a verse: {line[:60]!r}")
    by_chapter.setdefault(match[1], []).append(match[2])
  return ["\n".join(lines) + "\n" for lines in by_chapter.values()]


def batches(
  token_ids: np.ndarray, batch: int, length: int, seed: int
) -> Iterator[np.ndarray]:
  """Yields random windows `[batch, length]` of one long sequence, for ever."""
  rng = np.random.default_rng(seed)
  while True:
    start = rng.integers(0, len(token_ids) - length, (batch, 1))
    yield token_ids[start + np.arange(length)]


def make_update(
  optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[Params, Any, jax.Array]]:
  """Returns the jitted `(params, state, token_ids) -> (..., loss)` step."""

  def loss(params: Params, token_ids: jax.Array) -> jax.Array:
    model = ffjax.Model(params=params, config=CONFIG)
    lengths = jnp.full((token_ids.shape[0],), token_ids.shape[1], jnp.int32)
    nll = scoring.token_nll(model, token_ids, lengths, dtype=jnp.bfloat16)
    return jnp.mean(nll)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(
    params: Params, state: Any, token_ids: jax.Array
  ) -> tuple[Params, Any, jax.Array]:
    value, gradient = jax.value_and_grad(loss)(params, token_ids)
    change, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, change), state, value

  return update


def as_saved(params: Params) -> ffjax.Model:
  """Returns the model with the weights rounded as they are saved."""
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  return ffjax.Model(
    params=rounded, config=CONFIG, tokenizer=text.ByteTokenizer()
  )


def main(argv: list[str]) -> None:
  """Trains, keeps the best step, writes checkpoint, log and held-out text."""
  del argv
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True)
  parts = chapters(pathlib.Path(_TEXT.value).read_text(encoding="ascii"))
  held_out = parts[0::40]
  validation = parts[20::40]
  tokenizer = text.ByteTokenizer()
  train = np.concatenate(
    [
      np.asarray(tokenizer.encode(part), np.int32)
      for i, part in enumerate(parts)
      if i % 20
    ]
  )
  log_lines = []

  def log(**fields: Any) -> None:
    log_lines.append(json.dumps(fields))
    print(log_lines[-1], flush=True)

  rate = optax.warmup_cosine_decay_schedule(
    0.0,
    _PEAK_RATE.value,
    _STEPS.value // 20,
    _STEPS.value,
    0.01 * _PEAK_RATE.value,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(rate, b2=0.98, weight_decay=_WEIGHT_DECAY.value),
  )
  params = init_params(jax.random.key(_SEED.value), CONFIG, jnp.float32)
  state = optimizer.init(params)
  update = make_update(optimizer)
  stream = batches(
    train, _BATCH.value, CONFIG.max_position_embeddings, _SEED.value
  )
  log(
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
    flags={
      flag.name: flag.value
      for flag in (_STEPS, _BATCH, _PEAK_RATE, _WEIGHT_DECAY, _SEED)
    },
    num_params=CONFIG.num_params,
    train_bytes=len(train),
    chapters=len(parts),
  )
  best_bits, best = float("inf"), None
  begin = time.monotonic()
  for step in range(1, _STEPS.value + 1):
    params, state, loss = update(params, state, next(stream))
    if step % 250 == 0 or step == _STEPS.value:
      model = as_saved(params)
      bits = scoring.bits_per_byte(model, validation)
      log(
        step=step,
        train_bits_per_byte=round(float(loss) / float(np.log(2)), 4),
        validation_bits_per_byte=round(bits, 4),
        seconds=round(time.monotonic() - begin, 1),
      )
      if bits < best_bits:
        best_bits, best = bits, jax.tree.map(np.asarray, model.params)
  kept = ffjax.Model(params=best, config=CONFIG, tokenizer=text.ByteTokenizer())
  log(
    validation_bits_per_byte=round(best_bits, 4),
    heldout_bits_per_byte=round(scoring.bits_per_byte(kept, held_out), 4),
  )
  ffjax.save(kept, output)
  (output / "heldout.txt").write_text("\n".join(held_out), encoding="ascii")
  log_path = output / "training_log.jsonl"
  log_path.write_text("\n".join(log_lines) + "\n", encoding="ascii")


if __name__ == "__main__":
  flags.mark_flags_as_required(["text", "output"])
  app.run(main)
