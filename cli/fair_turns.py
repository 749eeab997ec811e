"""Decides which text of a server is written next: one thread runs the model, and all requests take
turns block by block.

Notable choices:
- Jobs with the same settings and a similar length are denoised as one *batch*; a batch is a
  generator that one turn advances by one block.
- Lengths fall into *classes*, and the shortest goes first, so a short text is delayed by a long one
  only for the block at hand; within a class the batch with the fewest turns goes first. Every
  `PATIENCE`-th turn goes to the batch that has waited longest, so long texts go on whatever else
  arrives.
- A class has `LANES` batches at a time. Long texts cannot occupy the lanes of short ones, and what
  waits for a lane gathers into a larger batch meanwhile, which costs little more than a batch of
  one.
- Clients are served evenly: the next place in a batch belongs to the client with the fewest texts
  in front of it.
- Jobs whose client has left are dropped at the next denoising step.
"""

import asyncio
import contextlib
import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tokcom.cli.loading import num_fillings
from tokcom.cli.scoring import score_tokens
from tokcom.pipeline_tokcom import GAP, TokComPiece, TokComPipeline

LANES = 2  # batches of one class of lengths at a time
CLASS_RATIO = 4  # the longest text of a class is at most so many times as long as its shortest
PATIENCE = 16  # one turn in so many goes to the batch that has waited longest
logger = logging.getLogger("tokcom.serve")


class RequestError(Exception):
    """What a client is told: an HTTP status, a message and OpenAI's names for the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def closing_error() -> RequestError:
    return RequestError(503, "the server is shutting down; try again later.", "server_error")


def full_error(limit: int) -> RequestError:
    return RequestError(
        429, f"more than {limit} texts would wait; try again later.", "rate_limit_error"
    )


class Sampling(NamedTuple):
    """The settings that the texts of one batch share; None stands for the model's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_p: float | None = None


class Scores(NamedTuple):
    """Log-probabilities of the tokens of a text.

    `ids` are those of the prompt and of what was written, `own[i]` is the log-probability of token
    i given those before it, and `best[i]` the likeliest ids in its place with theirs. The first
    token has none.
    """

    ids: list[int]
    own: list[float | None]
    best: list[list[tuple[int, float]]]


class Piece(NamedTuple):
    """What a text gains in one turn; see `TokComPiece`. The last piece carries `scores` if they
    were asked for."""

    text: str
    tokens: int
    finish_reason: str | None
    scores: Scores | None = None


@dataclass(eq=False)
class Job:
    """One text to write, for one client.

    Args:
        ids: the prompt's token ids.
        max_tokens: tokens to write; 0 only scores the prompt.
        client: whom it is for. Clients are served evenly.
        deadline: when the answer is given up, in seconds of `time.monotonic`.
        company: only jobs with equal values are denoised together.
        infill: the text before and after a gap of `max_tokens` tokens, for a job that fills one.
        num_logprobs: how many of the likeliest tokens to name in each place; None scores nothing.
        pieces: receives every `Piece`, or the exception that ended the job.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    loop: asyncio.AbstractEventLoop
    client: str = ""
    deadline: float = float("inf")
    company: object = None
    infill: tuple[str, str] | None = None
    num_logprobs: int | None = None
    pieces: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        # at the deadline the answer itself cancels its jobs, unless it cannot since its client does
        # not read
        return self.cancelled or time.monotonic() > self.deadline + 1

    @property
    def length_class(self) -> int:
        """0 for texts of up to `CLASS_RATIO**2` tokens, one more for each `CLASS_RATIO` times as
        long."""
        # classes by powers of the ratio: up to 16 tokens, up to 64, up to 256 and so on
        size = 0
        while self.max_tokens > CLASS_RATIO ** (size + 2):
            size += 1
        return size

    @property
    def key(self) -> tuple:
        """Jobs with equal keys fit into one batch."""
        own = None if self.infill is None else id(self)  # a gap is filled alone
        writes = self.max_tokens > 0
        return writes, self.length_class, self.sampling, self.company, own

    def put(self, item: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Dropped(Exception):
    """Nobody waits for the text at hand."""


class Paused:
    """Runs `call(pipe)` in a thread of its own, which waits after every `every`-th denoising step
    until the next turn.

    For calls that are no generators, and for models that denoise all at once. `call` gets a
    pipeline of its own, whose scheduler is shared with nobody, because it rests in the middle of a
    block. Iterating gives None at each rest; then `result` is what the call returned. Raises what
    the call raises.
    """

    def __init__(
        self, call: Callable, pipe: TokComPipeline, every: int, should_stop: Callable[[], bool]
    ):
        self.result = None
        self._error: BaseException | None = None
        self._every = every
        self._should_stop = should_stop
        self._steps = 0
        self._closed = False
        # Two semaphores pass the turn to and fro, so only one of the threads runs at any time:
        # `_turn` lets the call go on, `_rests` tells whoever gave the turn that it has stopped.
        self._turn = threading.Semaphore(0)
        self._rests = threading.Semaphore(0)
        self._finished = False
        own = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
        own.progress_bar = lambda *args, **kwargs: self  # a bar is told of every denoising step
        self._thread = threading.Thread(
            target=self._run, args=(call, own), name="tokcom-paused", daemon=True
        )
        self._thread.start()

    def _run(self, call: Callable, pipe: TokComPipeline) -> None:
        # nothing is computed before the first turn is given
        self._turn.acquire()
        try:
            if not self._closed:
                self.result = call(pipe)
        except BaseException as error:  # raised again in the thread that gives the turns
            self._error = error
        self._finished = True
        # after `_finished`, which whoever waits reads next
        self._rests.release()

    def update(self, n: int = 1) -> None:
        """Called by the pipeline after each denoising step."""
        self._steps += 1
        # asked at every step, so a text that nobody waits for ends within one
        if self._should_stop():
            raise Dropped
        if self._steps % self._every == 0:
            self._rests.release()
            self._turn.acquire()
            if self._closed:
                # unwinds the call, which cannot be ended from outside
                raise Dropped

    def close(self) -> None:
        """End the call at the step at which it rests; also how a progress bar is closed, which its
        own thread does."""
        # a thread cannot wait for its own end
        if threading.current_thread() is not self._thread and not self._finished:
            self._closed = True
            self._turn.release()
            self._thread.join()

    def __iter__(self) -> "Paused":
        return self

    def __next__(self) -> None:
        if self._finished:
            raise StopIteration
        self._turn.release()
        self._rests.acquire()
        if self._error is not None:
            # in the thread that gave the turn, where somebody can tell the client
            raise self._error
        if self._finished:
            raise StopIteration


class Batch:
    """Jobs that are written together, one block a turn."""

    def __init__(self, jobs: list[Job], pipe: TokComPipeline):
        self.jobs = jobs
        self.pipe = pipe
        self.turns = 0
        self.last_turn = 0
        self.finished = [False] * len(jobs)
        self.length_class = jobs[0].length_class
        self._writing = self._infill() if jobs[0].infill else self._continue()

    def advance(self) -> bool:
        """Take one turn; returns whether there is more to do. What goes wrong is told to the
        jobs."""
        self.turns += 1
        try:
            next(self._writing)
            return True
        except (StopIteration, Dropped):
            pass
        except Exception as error:  # one batch fails, the server goes on
            # a ValueError is a setting that the model refuses, which the client is told
            if not isinstance(error, ValueError):
                logger.exception("a batch of %d texts failed", len(self.jobs))
            self._end(error)
        self._end(closing_error())  # of jobs that nobody waits for
        return False

    def stop(self, error: Exception) -> None:
        self._writing.close()
        self._end(error)

    def _end(self, error: Exception) -> None:
        for i, job in enumerate(self.jobs):
            if not self.finished[i]:
                self.finished[i] = True
                job.put(error)

    def _abandoned(self) -> bool:
        # a batch goes on while a single one of its texts is wanted
        return all(done or job.gone for done, job in zip(self.finished, self.jobs))

    def _continue(self) -> Iterator[None]:
        """Write the jobs' texts; the pieces of each are put as they come, its scores at the end."""
        written: list[list[int]] = [[] for _ in self.jobs]
        last: list[TokComPiece | None] = [None] * len(self.jobs)
        for pieces in self._pieces():
            for i, piece in enumerate(pieces):
                job = self.jobs[i]
                if last[i] is not None:  # it has ended
                    continue
                written[i].extend(piece.ids)
                if piece.finish_reason is not None:
                    last[i] = piece
                    # the last piece waits for the scores, which need the whole text
                    if job.num_logprobs is not None:
                        continue
                    self.finished[i] = True
                # a turn may end inside a character, of which nothing can be shown yet
                if piece.text or piece.finish_reason:
                    job.put(Piece(piece.text, piece.tokens, piece.finish_reason))
            if self._abandoned():
                return
            yield
        for i, job in enumerate(self.jobs):
            if not self.finished[i] and not job.gone and last[i] is not None:
                scores = self._score(job, written[i])
                self.finished[i] = True
                job.put(Piece(last[i].text, last[i].tokens, last[i].finish_reason, scores))
                # scoring is a turn of its own, since it reads the whole text once more
                yield

    def _pieces(self) -> Iterator[list[TokComPiece]]:
        """What all jobs gain in each turn; nothing at all for jobs that only score a prompt."""
        lengths = [job.max_tokens for job in self.jobs]
        # `echo` with `logprobs` and no new tokens: only `_score` has work to do
        if not any(lengths):
            yield [TokComPiece("", 0, "length")] * len(self.jobs)
            return
        # one for each text, so that its noise does not depend on who else is in the batch
        generators = [torch.Generator().manual_seed(job.seed) for job in self.jobs]
        prompts = [job.ids for job in self.jobs]
        sampling = *self.jobs[0].sampling, generators

        if self.pipe.model.config.transformer_config.block_size is not None:
            yield from self.pipe.stream_batch(prompts, lengths, *sampling, self._abandoned)
            return

        def write(pipe: TokComPipeline) -> list[list[TokComPiece]]:
            return list(pipe.stream_batch(prompts, lengths, *sampling))

        # all tokens are denoised at once, so turns are steps
        paused = Paused(write, self.pipe, every=1, should_stop=self._abandoned)
        try:
            for _ in paused:
                yield [TokComPiece("", 0, None)] * len(self.jobs)
        finally:
            paused.close()
        yield from paused.result

    def _score(self, job: Job, written: list[int]) -> Scores:
        ids = job.ids + written
        logprobs = score_tokens(self.pipe.model, ids)  # (T - 1, V)
        following = torch.tensor(ids[1:], device=logprobs.device)
        own = logprobs.gather(1, following[:, None])[:, 0].tolist()
        values, likeliest = logprobs.topk(max(1, job.num_logprobs), dim=-1)
        # pairs of an id and its log-probability, for each place
        best = [list(zip(*row)) for row in zip(likeliest.tolist(), values.tolist())]
        # nothing stands before the first token that would give it a probability
        return Scores(ids, [None, *own], [[], *best])

    def _infill(self) -> Iterator[None]:
        """Fill the gap of the one job of this batch."""
        (job,) = self.jobs
        before, after = job.infill
        steps = job.sampling.num_inference_steps or self.pipe.model.config.num_inference_steps
        generator = torch.Generator().manual_seed(job.seed)

        def fill(pipe: TokComPipeline) -> str:
            gapped = before + GAP + after
            options = {"generator": generator, "num_candidates": num_fillings(pipe)}
            return pipe.infill(gapped, job.max_tokens, *job.sampling, **options).texts[0]

        paused = Paused(fill, self.pipe, every=steps, should_stop=self._abandoned)
        try:
            yield from paused
        finally:
            paused.close()
        # `infill` returns the whole text, of which the client has both sides
        middle = paused.result[len(before) : len(paused.result) - len(after)]
        self.finished[0] = True
        job.put(Piece(middle, job.max_tokens, "length"))


class Engine:
    """Runs the model in a thread of its own, and gives every batch its turns."""

    def __init__(
        self,
        pipe: TokComPipeline,
        max_batch: int = 32,
        max_queue: int = 256,
        batch_wait: float = 0.01,
    ):
        self.pipe = pipe
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.batch_wait = batch_wait
        self.waiting: list[Job] = []  # in the order in which they came
        self.active: list[Batch] = []
        self.batches = 0  # begun so far
        self.changed = threading.Condition()
        self.draining = False
        self.closed = False
        self._turns = 0
        # the only thread that uses the model, which is not safe in two
        self.thread = threading.Thread(target=self._run, name="tokcom", daemon=True)
        self.thread.start()

    @property
    def running(self) -> int:
        """Texts that are being written."""
        # a copy, because the engine's thread may remove a batch meanwhile
        return sum(len(batch.finished) - sum(batch.finished) for batch in list(self.active))

    # ---- called by the server's other threads ----

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of `jobs` or, if there is no room, none: then raises `RequestError`.

        If the queue is full, the client with the most waiting texts loses its latest ones to a
        client with fewer.
        """
        with self.changed:
            if self.draining or self.closed:
                raise closing_error()
            # whose client has left takes no place in the queue
            self.waiting = [job for job in self.waiting if not job.gone]
            excess = len(self.waiting) + len(jobs) - self.max_queue
            if excess > 0:
                displaced = self._displaced(jobs[0].client, len(jobs), excess)
                self.waiting = [job for job in self.waiting if job not in displaced]
                for job in displaced:
                    # whoever was displaced is told to try again, instead of waiting for nothing
                    job.put(full_error(self.max_queue))
            self.waiting.extend(jobs)
            self.changed.notify_all()

    def _displaced(self, client: str, count: int, excess: int) -> list[Job]:
        """The `excess` waiting jobs that make room for `count` new ones of a client; raises if it
        may not displace any."""
        waiting = Counter(job.client for job in self.waiting)
        displaced = []
        for _ in range(excess):
            heaviest, most = max(waiting.items(), key=lambda item: item[1], default=(None, 0))
            # only who would still have more than the newcomer gives way, or two would push each
            # other out
            if most <= waiting[client] + count or heaviest == client:
                raise full_error(self.max_queue)
            latest = next(
                job
                for job in reversed(self.waiting)
                if job.client == heaviest and job not in displaced
            )
            # the latest has waited for the shortest time
            displaced.append(latest)
            waiting[heaviest] -= 1
        return displaced

    def drain(self) -> None:
        """Take no more jobs, and finish those that there are."""
        with self.changed:
            self.draining = True
            self.changed.notify_all()

    def close(self) -> None:
        """End after the turn at hand; unfinished jobs are told so."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        # a turn may take seconds; a thread that hangs must not keep the process from ending
        self.thread.join(10)
        for job in self.waiting:
            job.put(closing_error())

    # ---- the thread ----

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.active or self.closed)
                if self.closed:
                    break
                if not self.active:  # others may come at the same moment
                    self.changed.wait_for(
                        lambda: self.closed or len(self.waiting) >= self.max_batch, self.batch_wait
                    )
                self._admit()
            if self.active:
                self._take_turn()
        for batch in self.active:
            batch.stop(closing_error())
        self.active = []

    def _admit(self) -> None:
        """Begin batches of waiting jobs where a lane is free."""
        self.waiting = [job for job in self.waiting if not job.gone]
        occupied = Counter(batch.length_class for batch in self.active)
        for job in self._in_fair_order():
            size = job.length_class
            if occupied[size] >= LANES or job not in self.waiting:
                continue
            # again in fair order, since counts change with every batch that begins
            fitting = [other for other in self._in_fair_order() if other.key == job.key]
            taken = fitting[: self.max_batch]
            self.waiting = [other for other in self.waiting if other not in taken]
            self.active.append(Batch(taken, self.pipe))
            # a new batch has not waited yet
            self.active[-1].last_turn = self._turns
            self.batches += 1
            occupied[size] += 1

    def _in_fair_order(self) -> list[Job]:
        """The waiting jobs; those of clients with fewer texts in front of them come first."""
        ahead = Counter(job.client for batch in self.active for job in batch.jobs)
        ranked = []
        for arrival, job in enumerate(self.waiting):
            ranked.append((ahead[job.client], arrival, job))
            # a client's second text stands behind the first texts of all others
            ahead[job.client] += 1
        return [job for _, _, job in sorted(ranked, key=lambda entry: entry[:2])]

    def _take_turn(self) -> None:
        self._turns += 1
        if self._turns % PATIENCE == 0:
            # the batch that has waited longest, so that nothing starves
            batch = min(self.active, key=lambda b: b.last_turn)
        else:
            # shortest texts first, among them the batch that is least far, then the one that waited
            # longest
            batch = min(self.active, key=lambda b: (b.length_class, b.turns, b.last_turn))
        batch.last_turn = self._turns
        more = batch.advance()
        if not more:
            with self.changed:
                self.active.remove(batch)


__all__ = ["Batch", "Engine", "Job", "Paused", "Piece", "RequestError", "Sampling", "Scores"]
