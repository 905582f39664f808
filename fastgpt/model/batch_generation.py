"""Many prompts of any lengths at once, without padding.

Each read of the weights serves all that run. A sequence that ends leaves at once, and the next
prompt takes its place.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import dispatch
from fastgpt.config import as_id_list, check_ids
from fastgpt.model.generation import new_cache, steps
from fastgpt.model.gpt import GPTModel
from fastgpt.model.rows import rows_of
from fastgpt.model.sampling import Choose, likeliest, sampler

Prompts = Sequence[Sequence[int] | Tensor]
Ends = Callable[[int, int], bool]  # number of the prompt, its next token

# Of the rows, one part in so many must be free before prompts are admitted: together they are
# cheaper than one by one.
_ADMITTED = 8


def generate_batch(
    model: nn.Module,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int],
    context_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
    *,
    seed: int | None = None,
    batch_size: int = 32,
    cache_bytes: int = 2 << 30,
) -> list[list[int]]:
    """``generate`` for many prompts of any lengths, several at once and without padding.

    Each gets the tokens that it gets alone, whatever the batch size and its neighbours: in full
    precision, bfloat16 and int8 on the CPU bit for bit. With int4 weights on the CPU, or on a GPU,
    sums are rounded differently by the number of rows, and of two tokens that are all but equally
    likely the other may be taken. A model with hooks, replaced modules or dropout goes prompt by
    prompt, which a warning says.

    Args:
        model: any module from ids [B, T] to logits [B, T, vocab_size].
        prompts: lists of ids or 1-D tensors, each of at least one token.
        max_new_tokens: the most tokens to append, one number for all or one a prompt.
        context_size: how many of the last tokens the model sees, by default its context length.
        temperature, top_k, top_p: as for ``generate``. Prompt i is drawn for by a generator of its
            own, seeded with seed + i: ``torch.manual_seed(seed + i)`` and ``generate`` draw the
            same.
        eos_id: a sequence ends before this token.
        seed: by default one drawn from torch's generator, if tokens are drawn at all.
        batch_size: the most sequences at once.
        cache_bytes: the most memory for keys and values; fewer sequences run at once if they would
            not fit, but always one.

    Returns:
        Each prompt with its continuation, in the order given.

    Raises:
        TypeError: the ids are not integers.
        ValueError: a prompt is empty or not one sequence, another argument is out of its range, or
            context_size is more than the model's context and a sequence outgrows it.
        IndexError: an id is outside the vocabulary.
    """
    texts = [as_id_list(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    stream = generate_batch_stream(
        model,
        texts,
        max_new_tokens,
        context_size,
        temperature,
        top_k,
        eos_id,
        top_p,
        seed=seed,
        batch_size=batch_size,
        cache_bytes=cache_bytes,
    )
    for number, token in stream:
        texts[number].append(token)
    return texts


def generate_batch_stream(
    model: nn.Module,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int],
    context_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    top_p: float | None = None,
    *,
    seed: int | None = None,
    batch_size: int = 32,
    cache_bytes: int = 2 << 30,
    ends: Ends | None = None,
) -> Iterator[tuple[int, int]]:
    """``generate_batch``, yielding (number of the prompt, token) as they come.

    Args, errors: those of ``generate_batch``, and

        ends: called with each (number of the prompt, token) before it is yielded; if it returns
            True, the sequence ends with this token, and the next prompt takes its place.

    The model may be changed between two tokens, which shows from the next pass on, and stopping
    early leaves nothing behind.
    """
    choose = sampler(temperature, top_k, top_p)
    texts = [as_id_list(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    for name, value in (("batch_size", batch_size), ("cache_bytes", cache_bytes)):
        if value < 1:
            raise ValueError(f"{name} {value} is below 1")
    limits = _limits(max_new_tokens, len(texts))
    if context_size is None:
        context_size = _context_of(model)
    elif context_size < 1:
        raise ValueError(f"context_size {context_size} is below 1")
    _check(model, texts, limits, context_size)
    if choose is likeliest:
        seed = None
    elif seed is None:
        seed = int(torch.randint(1 << 62, (), device="cpu"))
    elif not -(1 << 63) <= seed <= (1 << 64) - len(texts):
        raise ValueError(f"seed {seed} leaves no seed of 64 bits for each of {len(texts)} prompts")
    waiting = deque(
        _Sequence(i, text, limits[i], None if seed is None else seed + i)
        for i, text in enumerate(texts)
        if limits[i] > 0
    )
    batch = _Batch(model, waiting, context_size, choose, eos_id, batch_size, cache_bytes, ends)
    return batch.run()


def _limits(max_new_tokens: int | Sequence[int], n: int) -> list[int]:
    if isinstance(max_new_tokens, Integral):
        return [int(max_new_tokens)] * n
    limits = [int(limit) for limit in max_new_tokens]  # type: ignore[union-attr]
    if len(limits) != n:
        raise ValueError(f"max_new_tokens has {len(limits)} numbers for {n} prompts")
    return limits


def _context_of(model: nn.Module) -> int:
    if not isinstance(model, GPTModel):
        raise ValueError("context_size is needed: this model is not a fastgpt.GPTModel")
    return model.max_context()


def _check(
    model: nn.Module, texts: Sequence[list[int]], limits: Sequence[int], context_size: int
) -> None:
    """Refuses at once what a pass would refuse in the middle."""
    if not isinstance(model, GPTModel):
        return
    longest = model.max_context()
    for i, (text, limit) in enumerate(zip(texts, limits, strict=True)):
        seen = min(len(text) + limit - 1, context_size)
        if limit > 0 and seen > longest:
            raise ValueError(
                f"{seen} tokens of prompt {i} are more than the context length {longest}"
            )
    if isinstance(model.tok_emb, nn.Embedding):
        for text in texts:
            check_ids(torch.tensor(text, device="cpu"), model.tok_emb.weight.shape[0])


@dataclass(eq=False)
class _Sequence:
    """A prompt on its way."""

    number: int
    ids: list[int]
    left: int  # tokens to append
    seed: int | None
    generator: torch.Generator | None = None
    row: int | None = None
    ended: bool = False


@dataclass
class _Batch:
    model: nn.Module
    waiting: deque[_Sequence]
    context_size: int
    choose: Choose
    eos_id: int | None
    batch_size: int
    cache_bytes: int
    ends: Ends | None

    def run(self) -> Iterator[tuple[int, int]]:
        """The sequences' tokens, each with its sequence's number."""
        running: list[_Sequence] = []
        with contextlib.ExitStack() as stack:
            rows: Any = None
            if isinstance(self.model, GPTModel) and new_cache(self.model) is not None:
                self.batch_size = self._most_rows(self.model)
                steps_each = sum(s.left for s in self.waiting) // self.batch_size
                rows = stack.enter_context(rows_of(self.model, self.batch_size, steps_each))
            while (self.waiting or running) and rows is not None and rows.serves():
                new = self._admitted(running)
                running += new
                try:
                    with torch.no_grad():
                        tokens = self._tokens(rows, new, running)
                except dispatch.KernelError:  # the backend has said so
                    break
                for sequence in running:
                    yield from self._append(sequence, tokens[sequence.number])
                for sequence in running:
                    outgrown = len(sequence.ids) > self.context_size
                    if sequence.row is not None and (sequence.ended or outgrown):
                        rows.release(sequence.row)
                        sequence.row = None
                running = [sequence for sequence in running if not sequence.ended]
            del rows  # with the keys and values of what is left
        self.waiting.extendleft(reversed(running))
        if self.waiting:
            self._say_why()
        while self.waiting:
            yield from self._alone(self._next())

    def _admitted(self, running: Sequence[_Sequence]) -> list[_Sequence]:
        """The next prompts, as many as there are rows and memory for."""
        free = self.batch_size - len(running)
        if running and free < max(1, self.batch_size // _ADMITTED):
            return []
        taken = {sequence.row for sequence in running}
        numbers = iter(row for row in range(self.batch_size) if row not in taken)
        memory = sum(map(self._bytes_of, running))
        new: list[_Sequence] = []
        while self.waiting and len(new) < free:
            memory += self._bytes_of(self.waiting[0])
            if memory > self.cache_bytes and (running or new):
                break
            sequence = self._next()
            if len(sequence.ids) <= self.context_size:
                sequence.row = next(numbers)
            new.append(sequence)
        return new

    def _next(self) -> _Sequence:
        """The next prompt, with its generator."""
        sequence = self.waiting.popleft()
        if sequence.seed is not None and sequence.generator is None:
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            sequence.generator = torch.Generator(device).manual_seed(sequence.seed)
        return sequence

    def _tokens(
        self, rows: Any, new: Sequence[_Sequence], running: Sequence[_Sequence]
    ) -> dict[int, int]:
        """The next token of each sequence by its number."""
        tokens: dict[int, int] = {}
        held = [s for s in running if s.row is not None]
        first, further = [s for s in held if s in new], [s for s in held if s not in new]
        if further:  # before the prompts: a graph's step moves every row that holds a sequence
            logits = rows.step([s.ids[-1] for s in further], [s.row for s in further])
            self._choose(further, logits, tokens)
        if first:
            capacities = [self._capacity(s) for s in first]
            logits = rows.prefill([s.ids for s in first], [s.row for s in first], capacities)
            self._choose(first, logits, tokens)
        for s in running:
            if s.row is None:  # its window slides, and with it every position
                model: Any = self.model
                device = next(model.parameters()).device
                window = torch.tensor([s.ids[-self.context_size :]], device=device)
                self._choose([s], model.forward_pass(window, None, True)[:, -1], tokens)
        return tokens

    def _choose(
        self, sequences: Sequence[_Sequence], logits: Tensor, tokens: dict[int, int]
    ) -> None:
        generators = [s.generator for s in sequences]
        drawn = self.choose(logits, None if None in generators else generators)
        tokens |= zip((s.number for s in sequences), drawn[:, 0].tolist(), strict=True)

    def _append(self, sequence: _Sequence, token: int) -> Iterator[tuple[int, int]]:
        if token == self.eos_id:
            sequence.ended = True
            return
        sequence.ids.append(token)
        sequence.left -= 1
        over = self.ends is not None and self.ends(sequence.number, token)
        sequence.ended = over or sequence.left == 0
        yield sequence.number, token

    def _alone(self, sequence: _Sequence) -> Iterator[tuple[int, int]]:
        """The rest of a sequence, by the loop that takes any model."""
        device = next((p.device for p in self.model.parameters()), None)
        generators = None if sequence.generator is None else [sequence.generator]
        stream = steps(
            self.model,
            torch.tensor([sequence.ids], device=device),
            sequence.left,
            self.context_size,
            self.choose,
            watched=True,
            generators=generators,
        )
        for new in stream:
            yield from self._append(sequence, int(new))
            if sequence.ended:
                return

    def _capacity(self, sequence: _Sequence) -> int:
        """The most tokens whose keys and values it needs."""
        return min(len(sequence.ids) + sequence.left, self.context_size)

    def _bytes_of(self, sequence: _Sequence) -> int:
        if len(sequence.ids) > self.context_size:
            return 0
        return self._capacity(sequence) * self._bytes_of_token()

    def _bytes_of_token(self) -> int:
        model: Any = self.model
        pos = model.pos_emb.weight
        return 2 * len(model.trf_blocks) * pos.shape[1] * pos.element_size()

    def _most_rows(self, model: GPTModel) -> int:
        """The batch size, or fewer: a GPU's graph has room for a whole context in each row."""
        most = max(1, min(self.batch_size, len(self.waiting)))
        if model.pos_emb.weight.is_cpu:
            return most
        return max(1, min(most, self.cache_bytes // (model.max_context() * self._bytes_of_token())))

    def _runs_whole(self) -> bool:
        """Whether the C++ kernels would take a whole pass, of another model at least."""
        with torch.no_grad():
            return dispatch.takes_whole_pass(torch.zeros(1, 1, dtype=torch.int64, device="cpu"))

    def _say_why(self) -> None:
        model = self.model
        if not isinstance(model, GPTModel):
            why = f"{type(model).__name__} is not a fastgpt.GPTModel"
        elif obstacles := model.obstacles():
            why = f"{obstacles[0].path or 'the model'}: {obstacles[0].reason}"
        elif new_cache(model) is None:
            why = "it drops something, or has no blocks"
        elif self._runs_whole():
            why = "a parameter's dtype, layout or size keeps it from running as one pass"
        else:  # a backend without rows, which says so itself where it was not asked for
            return
        warnings.warn(
            f"generate_batch takes the prompts one by one, because of the model: {why}",
            dispatch.BackendWarning,
            stacklevel=3,
        )
