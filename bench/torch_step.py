"""Decode steps in PyTorch: what the kernel is compared with; one sequence.

`Transformers` is Hugging Face's model with its static cache under
`torch.compile`; `CudaGraph` is a step written by hand, captured as one CUDA
graph, with or without the compiler behind it. On the CPU, for tests, nothing is
captured. Needs `torch` and `transformers`.
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from ffjax.config import LlamaConfig


class Peer(Protocol):
  """A way to decode one sequence."""

  def prefill(self, token_ids: Tensor) -> None:
    """Starts over with a prompt `[T]`, and chooses the next token."""

  def logits(self, token_ids: Tensor) -> Tensor:
    """Runs a step for each of `[n]` given tokens; float32 logits `[n, V]`."""

  def run(self, num_steps: int) -> Tensor:
    """Runs steps, greedily; the tokens `[num_steps]` that they chose."""


def make_model(config: LlamaConfig, seed: int, device: str) -> Any:
  """Makes Hugging Face's model of random weights, as `ffjax.random_model` does.

  Args:
    config: the model.
    seed: of the weights.
    device: where they are made.

  Returns:
    A `LlamaForCausalLM` in bfloat16.
  """
  theirs = transformers.LlamaConfig.from_dict(config.to_dict())
  theirs._attn_implementation = "sdpa"
  torch.set_default_dtype(torch.bfloat16)
  try:
    with torch.device(device):
      model = transformers.LlamaForCausalLM(theirs)
  finally:
    torch.set_default_dtype(torch.float32)
  generator = torch.Generator(device).manual_seed(seed)
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.02, generator=generator)
      if weight.ndim == 1:
        weight.mul_(0.1 / 0.02).add_(1)
  return model.eval()


@torch.no_grad()
def last_logits(model: Any, token_ids: Tensor, count: int) -> Tensor:
  """Runs all of `[T]` at once, without a cache; the last `[count, V]`."""
  out = model(token_ids[None], use_cache=False, logits_to_keep=count)
  return out.logits[0].float()


def float32_logits(model: Any, token_ids: Tensor, count: int) -> Tensor:
  """Returns what `last_logits` would in float32; needs room for a copy."""
  return last_logits(copy.deepcopy(model).float(), token_ids, count)


class Transformers:
  """`LlamaForCausalLM` with a static cache, compiled step by step."""

  def __init__(
    self, model: Any, capacity: int, compiler: Callable[..., Any] | None = None
  ):
    """Sets up the cache.

    Args:
      model: from `make_model`.
      capacity: token slots of the cache.
      compiler: of the step; None for `torch.compile` with CUDA graphs.
    """
    self._model = model
    self._cache = transformers.StaticCache(
      config=model.config, max_cache_len=capacity
    )
    self._token: Tensor | None = None
    if compiler is None:
      self._step = torch.compile(
        self._plain_step, mode="reduce-overhead", fullgraph=True, dynamic=False
      )
    else:
      self._step = compiler(self._plain_step)

  def _plain_step(self, token: Tensor) -> tuple[Tensor, Tensor]:
    out = self._model(token, past_key_values=self._cache, use_cache=True)
    logits = out.logits[0, -1].float()
    return logits, logits.argmax()[None, None]

  def _next(self, token: Tensor) -> tuple[Tensor, Tensor]:
    # What the graph returns is its own memory, which the next run reuses.
    torch.compiler.cudagraph_mark_step_begin()
    logits, chosen = self._step(token)
    return logits, chosen.clone()

  @torch.no_grad()
  def prefill(self, token_ids: Tensor) -> None:
    """See `Peer`; the prompt is not compiled."""
    self._cache.reset()
    out = self._model(
      token_ids[None],
      past_key_values=self._cache,
      use_cache=True,
      logits_to_keep=1,
    )
    self._token = out.logits[0, -1].float().argmax()[None, None]

  @torch.no_grad()
  def logits(self, token_ids: Tensor) -> Tensor:
    """See `Peer`."""
    rows = []
    for token_id in token_ids:
      logits, _ = self._next(token_id.reshape(1, 1).clone())
      rows.append(logits.clone())
    return torch.stack(rows)

  @torch.no_grad()
  def run(self, num_steps: int) -> Tensor:
    """See `Peer`."""
    token = self._token
    assert token is not None
    chosen = []
    for _ in range(num_steps):
      _, token = self._next(token)
      chosen.append(token[0])
    return torch.cat(chosen)


class CudaGraph:
  """A step written by hand over buffers that never move, as one CUDA graph."""

  def __init__(
    self, config: LlamaConfig, model: Any, capacity: int, compiled: bool
  ):
    """Joins the weights, allocates and captures.

    Args:
      config: the model.
      model: from `make_model`; q, k and v, gate and up are copied.
      capacity: token slots of the cache.
      compiled: whether the compiler makes the step's kernels.
    """
    c = self._config = config
    inner = model.model
    device = model.lm_head.weight.device
    self._embedding = inner.embed_tokens.weight.detach()
    self._head = model.lm_head.weight.detach()
    self._norm = inner.norm.weight.detach()
    self._layers = [_weights(layer) for layer in inner.layers]
    shape = (
      c.num_hidden_layers,
      c.num_key_value_heads,
      capacity,
      c.head_dim,
    )
    self._k, self._v = (
      torch.zeros(shape, dtype=self._head.dtype, device=device)
      for _ in range(2)
    )
    slots = torch.arange(capacity, device=device)
    rotary = inner.rotary_emb
    angles = slots[:, None] * rotary.inv_freq.float().to(device)
    self._cos, self._sin = angles.cos(), angles.sin()
    self._slots = slots
    self._token = torch.zeros(1, dtype=torch.long, device=device)
    self._position = torch.zeros(1, dtype=torch.long, device=device)
    # What each position chose.
    self._chosen = torch.zeros(capacity, dtype=torch.long, device=device)
    self._logits = torch.zeros(c.vocab_size, device=device)
    self._replay = self._captured(compiled, device)

  @torch.no_grad()
  def _captured(self, compiled: bool, device: Any) -> Callable[[], None]:
    step = self._step
    if compiled:
      step = torch.compile(
        step,
        fullgraph=True,
        dynamic=False,
        # With it, products with one vector are the compiler's own kernels.
        options={"coordinate_descent_tuning": True},
      )
    if device.type != "cuda":
      return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
      for _ in range(3):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      step()
    return graph.replay

  def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[heads, H]` in float32."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat(
      (first * cos - second * sin, second * cos + first * sin), dim=-1
    )
    return rotated.to(x.dtype)

  def _step(self) -> None:
    c = self._config
    n, kv, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    position = self._position
    cos, sin = self._cos[position], self._sin[position]
    visible = (self._slots <= position)[None, None, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
      return functional.rms_norm(x, (x.shape[-1],), weight, c.rms_norm_eps)

    x = functional.embedding(self._token, self._embedding)
    for i, w in enumerate(self._layers):
      y = functional.linear(norm(x, w["input_norm"]), w["qkv"])
      heads = y.view(n + 2 * kv, h)
      rotated = self._rotate(heads[: n + kv], cos, sin)
      keys, values = self._k[i], self._v[i]
      keys.index_copy_(1, position, rotated[n:, None])
      values.index_copy_(1, position, heads[n + kv :, None])
      # The query heads of a KV head are the rows of one small matrix.
      out = functional.scaled_dot_product_attention(
        rotated[:n].view(1, kv, n // kv, h),
        keys[None],
        values[None],
        attn_mask=visible,
      )
      x = x + functional.linear(out.reshape(1, n * h), w["o"])
      y = functional.linear(norm(x, w["post_norm"]), w["gate_up"])
      gate, up = y.chunk(2, dim=-1)
      x = x + functional.linear(functional.silu(gate) * up, w["down"])
    logits = functional.linear(norm(x, self._norm), self._head)[0].float()
    self._logits.copy_(logits)
    chosen = logits.argmax(-1, keepdim=True)
    self._chosen.index_copy_(0, position, chosen)
    self._token.copy_(chosen)
    self._position.add_(1)

  @torch.no_grad()
  def prefill(self, token_ids: Tensor) -> None:
    """See `Peer`; the prompt goes through the same steps."""
    self._position.zero_()
    for i in range(len(token_ids)):
      self._token.copy_(token_ids[i : i + 1])
      self._replay()

  @torch.no_grad()
  def logits(self, token_ids: Tensor) -> Tensor:
    """See `Peer`."""
    rows = []
    for i in range(len(token_ids)):
      self._token.copy_(token_ids[i : i + 1])
      self._replay()
      rows.append(self._logits.clone())
    return torch.stack(rows)

  @torch.no_grad()
  def run(self, num_steps: int) -> Tensor:
    """See `Peer`."""
    begin = int(self._position)
    for _ in range(num_steps):
      self._replay()
    return self._chosen[begin : begin + num_steps].clone()


def _weights(layer: Any) -> dict[str, Tensor]:
  attention, mlp = layer.self_attn, layer.mlp

  def joined(*linears: Any) -> Tensor:
    return torch.cat([linear.weight.detach() for linear in linears])

  return dict(
    input_norm=layer.input_layernorm.weight.detach(),
    qkv=joined(attention.q_proj, attention.k_proj, attention.v_proj),
    o=attention.o_proj.weight.detach(),
    post_norm=layer.post_attention_layernorm.weight.detach(),
    gate_up=joined(mlp.gate_proj, mlp.up_proj),
    down=mlp.down_proj.weight.detach(),
  )
