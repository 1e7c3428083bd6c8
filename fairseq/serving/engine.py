"""One thread that runs the model: requests wait in a bounded queue, and join and leave the batch between steps.

The model runs without a wrapper; neighbours are mixed in per sequence, so that requests with other stores, weights and
temperatures share a forward call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fairseq.hf.decoding.mixing import Found, OpenMemory, RowMemory, RowMixer
from fairseq.hf.decoding.rows import CachedRows, RowDecoder, StepScores
from fairseq.hf.decoding.sampling import TokenSampler
from fairseq.serving.errors import ApiError
from fairseq.serving.jobs import Failure, Generation, GenerationJob, Job, Outcome, TaskJob
from fairseq.serving.metrics import Metrics
from fairseq.serving.rows import Row, prompt_events
from fairseq.serving.texts import Codec

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 2048
"""Of prompts that are read between two steps: a long one must not keep the others waiting for several."""
_PROMPT_POSITIONS = 256
"""Of a prompt whose log-probabilities are wanted, mixed at a time: a vocabulary wide each."""


@dataclass
class Batch:
    """Sequences in one forward call."""

    options: Mapping[str, Any]
    """Of the call, for all of them."""
    cached: CachedRows
    rows: list[Row] = field(default_factory=list)


class Engine:
    """Answers jobs with one model. ``submit`` may be called from any thread."""

    def __init__(
        self,
        decoder: RowDecoder,
        codec: Codec,
        memories: Mapping[str, Callable[[], OpenMemory]],
        metrics: Metrics,
        *,
        max_batch: int,
        max_waiting: int,
    ) -> None:
        """Args.

        memories: the stores by name, each as it is now.
        max_batch: sequences that are generated at once.
        max_waiting: jobs that wait, before more are rejected.
        """
        self.decoder, self.codec, self.metrics = decoder, codec, metrics
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._memories, self._mixer = memories, RowMixer()
        self._batches: list[Batch] = []
        self._waiting: deque[GenerationJob] = deque()
        self._tasks: deque[TaskJob] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Other threads

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present step; what waits or runs fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, *jobs: Job) -> None:
        """Take some jobs, all or none. Raises: ApiError when the queue is full or the server is stopping."""
        with self._changed:
            if self._stopping:
                raise ApiError(503, "the server is stopping", code="stopping")
            num_waiting = len(self._waiting) + len(self._tasks)
            if num_waiting + len(jobs) > self.max_waiting:
                self.metrics.count(self.metrics.rejected)
                seconds = self.metrics.seconds.mean * (num_waiting + 1) / self.max_batch
                raise ApiError(
                    429,
                    f"{num_waiting} requests wait, and the queue holds {self.max_waiting}; try again later",
                    code="queue_full",
                    retry_after=max(1, round(seconds)),
                )
            for job in jobs:
                if isinstance(job, TaskJob):
                    self._tasks.append(job)
                else:
                    self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job whose client went away."""
        with self._changed:
            if isinstance(job, GenerationJob) and not job.is_cancelled:
                job.is_cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)
                self.metrics.count(self.metrics.cancelled)
                self._changed.notify()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting) + len(self._tasks)

    @property
    def num_running(self) -> int:
        """Sequences that are generated."""
        return sum(len(batch.rows) for batch in self._batches)

    @property
    def is_alive(self) -> bool:
        """True while jobs are answered."""
        return self._thread.is_alive()

    # The engine's own thread

    def _run(self) -> None:
        try:
            while self._has_work():
                self._advance_task()
                self._admit()
                for batch in list(self._batches):
                    self._step(batch)
        except BaseException:  # a mistake of ours: /health says that nothing is answered any more
            logger.exception("the engine ended")
        finally:
            with self._changed:
                self._stopping = True
            self._fail_all(ApiError(503, "the server is stopping", code="stopping"))

    def _has_work(self) -> bool:
        """Wait for work; False when the engine is to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._tasks or self._batches):
                self._changed.wait()
            return not self._stopping

    def _advance_task(self) -> None:
        """One step of the first task."""
        with self._changed:
            task = self._tasks[0] if self._tasks else None
        if task is None:
            return
        try:
            task.running = task.running or task.steps()
            task.latest = next(task.running)
            return
        except StopIteration:
            result: Any = Outcome(task.latest)
        except Exception as error:
            result = Failure(_as_api_error(error))
        with self._changed:
            self._tasks.popleft()
        task.mailbox.put([result], is_last=True)

    def _admit(self) -> None:
        """Read the prompts of waiting jobs, as far as the batch has room."""
        tokens = 0
        while tokens < _PROMPT_TOKENS:
            with self._changed:
                if not self._waiting or self.num_running + self._waiting[0].request.num_choices > self.max_batch:
                    return
                job = self._waiting.popleft()
            tokens += len(job.request.prompt)
            try:
                self._begin(job)
            except Exception as error:
                job.is_cancelled = True  # its client did not go away, and is not to be counted as one that did
                job.mailbox.put([Failure(_as_api_error(error))], is_last=True)

    def _begin(self, job: GenerationJob) -> None:
        request = job.request
        memory = self._memory_of(request)
        wants_prompt = request.echo and request.num_top is not None
        options = dict(request.mind)
        cached, scores = self.decoder.read(request.prompt, all_positions=wants_prompt, **options)
        self.metrics.count(self.metrics.prompt_tokens, len(request.prompt))
        num_choices = request.num_choices
        rows = [self._row(job, choice, memory) for choice in range(num_choices)]
        job.has_begun, job.num_open = True, num_choices
        if request.echo:
            prompt = self._prompt(request, scores, memory)
            for row in rows:
                row.events += [replace(event, choice=row.choice) for event in prompt]
                row.num_characters = sum(len(event.text) for event in prompt)
        if not request.max_tokens:
            for row in rows:
                row.end_without_tokens()
        else:
            last = StepScores(
                scores.logits_BLV[:, -1:].expand(num_choices, -1, -1),
                {kind: key_BLD[:, -1:].expand(num_choices, -1, -1) for kind, key_BLD in scores.keys.items()},
            )
            self._choose(rows, last)
            cached.repeat(num_choices)
        self.metrics.count(self.metrics.first_token, time.perf_counter() - job.arrived)
        self._deliver(rows)
        if not all(row.is_done for row in rows):
            self._join(options, cached, rows)

    def _join(self, options: Mapping[str, Any], cached: CachedRows, rows: list[Row]) -> None:
        """Put sequences into a batch that they fit, or into one of their own."""
        batch = self._batch_for(options, cached)
        if batch is None:
            self._batches.append(Batch(options, cached, rows))
        else:
            batch.cached.join(cached)
            batch.rows += rows

    def _batch_for(self, options: Mapping[str, Any], cached: CachedRows) -> Batch | None:
        if not cached.can_join:
            return None
        return next((b for b in self._batches if b.cached.can_join and b.options == options), None)

    def _row(self, job: GenerationJob, choice: int, memory: OpenMemory | None) -> Row:
        request = job.request
        sampling = request.sampling.of_choice(choice)
        sampler = TokenSampler(self.decoder.model, sampling, len(request.prompt))  # type: ignore[arg-type]
        own = None if memory is None or request.knn is None else RowMemory(memory, request.knn)
        return Row.begin(job, choice, sampler, own, self.codec)

    def _memory_of(self, request: Generation) -> OpenMemory | None:
        return None if request.store is None or request.knn is None else self._memories[request.store]()

    def _prompt(self, request: Generation, scores: StepScores, memory: OpenMemory | None) -> list[Any]:
        """Events for the tokens of a prompt, with the mixture's log-probabilities where they are wanted."""
        if request.num_top is None:
            return list(prompt_events(request.prompt, None, (), None, self.codec))
        logits_LV = scores.logits_BLV[0].float()
        row = None if memory is None or request.knn is None else RowMemory(memory, request.knn)
        parts, found = [], []
        step = 1 if memory is not None and memory.automaton is not None else _PROMPT_POSITIONS
        for start in range(0, len(logits_LV), step):  # RetoMaton reads one position after the other
            part = slice(start, start + step)
            some_NV = logits_LV[part].clone()
            keys = {kind: key_BLD[0, part] for kind, key_BLD in scores.keys.items()}
            count = len(some_NV)
            token = request.prompt[start] if step == 1 else None
            wanted = [bool(request.num_neighbors)] * count
            found += self._mix_(some_NV, keys, [row] * count, [token] * count, wanted)
            parts.append(torch.log_softmax(some_NV, -1))
        short = [None if each is None else each.first(request.num_neighbors) for each in found]
        return list(prompt_events(request.prompt, torch.cat(parts), short, request.num_top, self.codec))

    def _step(self, batch: Batch) -> None:
        try:
            self._drop(batch)
            if batch.rows:
                scores = self.decoder.step(batch.cached, [row.ids[-1] for row in batch.rows], **batch.options)
                self._choose(batch.rows, scores)
                self._deliver(batch.rows)
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(batch.rows))
            failure = _as_api_error(error)
            for job in {id(row.job): row.job for row in batch.rows}.values():
                job.mailbox.put([Failure(failure)], is_last=True)
                job.is_cancelled = True
            batch.rows = []
        if not batch.rows:
            self._batches.remove(batch)

    def _drop(self, batch: Batch) -> None:
        """Take sequences out that are complete, or whose client went away."""
        keep = [n for n, row in enumerate(batch.rows) if not row.is_done and not row.job.is_cancelled]
        if len(keep) < len(batch.rows):
            batch.rows = [batch.rows[n] for n in keep]
            if keep:
                batch.cached.select(keep)

    def _choose(self, rows: list[Row], scores: StepScores) -> None:
        """Mix in each sequence's neighbours, and append its next token."""
        logits_BV = scores.logits_BLV[:, -1].float().clone()
        keys = {kind: key_BLD[:, -1] for kind, key_BLD in scores.keys.items()}
        for row in rows:
            if row.memory is not None:
                store = row.job.request.store
                assert store is not None
                row.memory.update(self._memories[store]())
        wanted = [bool(row.job.request.num_neighbors) for row in rows]
        tokens = [row.ids[-1] if row.num_new else None for row in rows]
        found = self._mix_(logits_BV, keys, [row.memory for row in rows], tokens, wanted)
        self._append(rows, logits_BV, found)

    def _mix_(self, scores_BV: Tensor, *more: Any) -> list[Found | None]:
        """As the mixer does; what it looks up is counted."""
        before = self._mixer.num_lookups, self._mixer.num_searches
        found = self._mixer.mix_(scores_BV, *more)
        self.metrics.count(self.metrics.lookups, self._mixer.num_lookups - before[0])
        self.metrics.count(self.metrics.searches, self._mixer.num_searches - before[1])
        return found

    def _append(self, rows: list[Row], scores_BV: Tensor, found: list[Found | None]) -> None:
        highest = scores_BV.argmax(-1).tolist()
        logp_BV = None
        if any(row.job.request.num_top is not None for row in rows):
            logp_BV = torch.log_softmax(scores_BV, -1).cpu()
        for n, row in enumerate(rows):
            try:
                token = highest[n] if row.sampler.takes_highest else row.sampler.choose(scores_BV[n], row.ids)
            except Exception as error:  # of this request alone: the others go on
                row.fail(_as_api_error(error))
            else:
                row.take(token, None if logp_BV is None else logp_BV[n], found[n])
        self.metrics.count(self.metrics.tokens, len(rows))

    def _deliver(self, rows: list[Row]) -> None:
        """Hand the events of a step to their requests."""
        by_job: dict[int, tuple[GenerationJob, list[Any]]] = {}
        for row in rows:
            if row.events:
                job, events = by_job.setdefault(id(row.job), (row.job, []))
                events += row.events
                row.events = []
                job.num_open -= row.is_done
        for job, events in by_job.values():
            is_last = job.num_open == 0 or job.is_cancelled
            job.mailbox.put(events, is_last=is_last)
            if is_last:
                self.metrics.count(self.metrics.seconds, time.perf_counter() - job.arrived)

    def _fail_all(self, error: ApiError) -> None:
        with self._changed:
            jobs: dict[int, Job] = {id(row.job): row.job for batch in self._batches for row in batch.rows}
            jobs |= {id(job): job for job in self._waiting}
            jobs |= {id(job): job for job in self._tasks}
            self._waiting.clear()
            self._tasks.clear()
            self._batches.clear()
        for job in jobs.values():
            if isinstance(job, TaskJob) and job.running is not None:
                _close(job.running)
            job.mailbox.put([Failure(error)], is_last=True)


def _close(running: Iterator[Any]) -> None:
    close = getattr(running, "close", None)
    if close is not None:
        close()


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the request failed: {type(error).__name__}: {error}")
