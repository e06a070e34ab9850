"""The training loop: steps, reports, evaluations and checkpoints, in the order they happen."""

import math
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx

from mlx_lora import adapter_files, checkpoint, files, generation, lora, memory, metrics, prefix
from mlx_lora.adapter_files import mlx_form
from mlx_lora.attention import Attention
from mlx_lora.batches import Batch, Batches, train_batches, valid_batches
from mlx_lora.checkpoint import Progress
from mlx_lora.config import Config
from mlx_lora.data import Dataset
from mlx_lora.errors import InputError, Interrupted
from mlx_lora.model import Base, can_compile, device
from mlx_lora.optim import learning_rate, make_optimizer
from mlx_lora.prefix import PrefixCache
from mlx_lora.scoring import score
from mlx_lora.step import Outcome, State, Step, prepared
from mlx_lora.supervisor import before, report_step

MAX_SKIPPED_IN_A_ROW = 10
LOST_WORK = 60.0  # seconds of training between checkpoints, with checkpoint.every: auto
SHOWN = 200  # characters of a sample on the console
SAVE_SHARE = 0.005  # of the time, that saving may take


@dataclass(frozen=True)
class Result:
    """Of a finished run. Losses are means per supervised token (nats); `final_loss` and `best_loss` are on the
    validation rows where there are any, else `final_loss` is that of the last update and `best_loss` is None."""

    final_loss: float
    best_loss: float | None
    best_step: int
    steps: int
    epochs: float
    tokens: int
    supervised_tokens: int
    seconds: float
    output_dir: Path


@dataclass
class Run:
    """One training run over an adapter that is attached to `base.model`."""

    config: Config
    base: Base
    train: Dataset
    valid: Dataset | None
    contract: dict[str, Any]
    log: metrics.Log = field(default_factory=metrics.Log)

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output_dir)
        self.batches = train_batches(self.config, self.train.examples)
        self.valid_batches = valid_batches(self.config, self.valid.examples) if self.valid else None
        self.steps = total_steps(self.config, self.batches)
        self.best: checkpoint.Saved | None = None
        self._ahead = memory.NoFurtherAhead()
        self._unsaved = False  # the last attempt to save failed
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        self.settings = mlx_form.settings(
            replace(lora.attached(self.base.model), base=self.config.model), len(self.base.model.layers)
        )

    def fit(self, resume_from: Path | None = None) -> Result:
        """Trains from the start or from a checkpoint to the end; a run that has ended stays as it is.

        Raises Interrupted after a signal, with the state saved; InputError where the loss stays non-finite.
        """
        progress = Progress() if resume_from is None else checkpoint.read_progress(resume_from)[0]
        if progress.finished:
            self.log.open(self.folder, progress.step)  # notes the last checkpoint, if it was killed just before
            self.log.close()
            self.log.say("this run has ended already")
            return self._result(progress)
        allowed = memory.available(self.config.train.memory_limit)
        with prepared(self.base.model, self.config.train) as attention, memory.limits(allowed):
            self._fit(attention, progress, resume_from)
        return self._result(progress)

    def _fit(self, attention: Attention, progress: Progress, resume_from: Path | None) -> None:
        options, model = self.config.train, self.base.model
        if self.config.data.packing:
            attention.require_packed(self.config.model.path, self.batches.largest().inputs.shape[1])
        self.prefix = self._prefix_cache()
        step = Step(model, make_optimizer(options), options, can_compile(), attention, self.prefix, self._ahead)
        self._say_layout(step)
        states = [step.initial_state()]  # taken from here below: a name for it would keep it during the whole run
        if resume_from is not None:
            states[0], self.best = checkpoint.restore(resume_from, states[0])
        earlier = self.log.open(self.folder, progress.step)
        mx.reset_peak_memory()  # what filled the cache is no need of an update
        try:
            self.log.start(
                earlier,
                progress.step,
                self.steps,
                self.config.log.report_to,
                self.config.model_dump(),
                **self._facts(),
            )
            self._base_answers = base_answers(earlier)
            with _Signals() as signals:
                if progress.step == 0:
                    self._evaluate(states[0].adapter, progress, learning_rate(self.config.train, 0, self.steps))
                elif self.best is not None:
                    self._keep(*self.best)  # what stands there may be of steps that are lost
                self._steps(step, states.pop(), progress, signals)
        finally:
            self.log.close()

    def _facts(self) -> dict[str, Any]:
        """What a report tells of the run beside its config."""
        counts = lora.count(self.base.model)
        return {
            "steps_per_epoch": self.batches.steps_per_epoch,
            "padding_efficiency": self.batches.padding_efficiency,
            "device": device(),
            "trainable": counts.trainable,
            "parameters": counts.total,
            "adapter_bytes": counts.adapter_bytes,
            "data": {"train": self.train.summary(), "valid": self.valid.summary() if self.valid else None},
        }

    def _prefix_cache(self) -> PrefixCache | None:
        """What the blocks below the lowest adapted one give for every row, where it is worth keeping."""
        options, model = self.config.train, self.base.model
        first = prefix.first_adapted_block(model)
        if options.prefix_cache == "never" or (options.prefix_cache == "auto" and first == 0):
            return None
        against = prefix.unusable(model)
        where, said = prefix.choose(
            options.prefix_cache,
            against,
            self.steps / self.batches.steps_per_epoch,
            0 if against else prefix.size(model, self.batches),
            options.prefix_cache_limit * 1e9,
            memory.available() / 10,
        )
        if said:
            self.log.say(said)
        return (
            None if where == "never" else PrefixCache(model, self.batches, None if where == "memory" else self.folder)
        )

    def _say_layout(self, step: Step) -> None:
        """What a step computes, as far as it is not plain from the config."""
        self.log.say(f"padding efficiency {self.batches.padding_efficiency:.2f}: real tokens of those computed")
        if step.output.whole:
            self.log.say(f"logits are computed at every position: {step.output.whole}")
        if step.output.at_once:
            self.log.say(f"all logits of a batch are in memory at once: {step.output.at_once}")

    def _steps(self, step: Step, state: State, progress: Progress, signals: "_Signals") -> None:
        config = self.config
        clock = time.perf_counter()
        kept = self.prefix.inputs if self.prefix else None
        for micro_batches in self.batches.steps(progress.step, self.steps, kept):
            rate = learning_rate(config.train, progress.step, self.steps)
            state, outcome = step(state, micro_batches, rate, progress.step)
            now = time.perf_counter()
            self._count(progress, micro_batches, outcome, now - clock)
            self.log.advance(progress.step)
            report_step(progress.step)

            progress.skipped_in_a_row = 0 if outcome.applied.item() else progress.skipped_in_a_row + 1
            if progress.skipped_in_a_row:
                self._warn_skipped(state, progress, micro_batches, rate)

            last = progress.step == self.steps
            if last or progress.step % config.log.every == 0:
                self._report(progress, outcome, rate)
            if last or (progress.step % config.eval.every == 0):
                self._evaluate(state.adapter, progress, rate)
                patience = config.eval.early_stopping
                if patience is not None and progress.evaluations_since_best >= patience:
                    self.log.notice(
                        "early_stop",
                        progress.step,
                        f"no better validation loss in {patience} evaluations: stopping",
                    )
                    last = True
            progress.finished = last
            stop = signals.received is not None
            if last or stop or self._due(progress):
                self._save(state, progress, rate, required=last or stop)
            if last and self.valid_batches is not None and self.best is None:
                raise InputError(
                    "the validation loss was never finite, so there is no best adapter: lower train.learning_rate or "
                    f"lora.alpha; the last one is in {self.folder / adapter_files.CHECKPOINTS}"
                )
            if last:
                return
            if stop:
                assert signals.received is not None
                stopped = f"stopped by {signal.Signals(signals.received).name} at step {progress.step}"
                self.log.record("note", progress.step, text=stopped)
                raise Interrupted(
                    signals.received,
                    f"stopped at step {progress.step} of {self.steps}, everything is saved; "
                    "go on with the same command and --resume",
                )
            clock = time.perf_counter()

    def _count(self, progress: Progress, batches: list[Batch], outcome: Outcome, seconds: float) -> None:
        tokens, supervised = sum(batch.tokens for batch in batches), sum(batch.supervised for batch in batches)
        progress.step += 1
        progress.tokens += tokens
        progress.supervised_tokens += supervised
        progress.seconds += seconds
        loss = float(outcome.loss.item())
        progress.loss = loss
        if not outcome.applied.item():
            loss, tokens, supervised = 0.0, 0, 0
        sums = {
            "loss": loss * supervised,
            "supervised": supervised,
            "tokens": tokens,
            "seconds": seconds,
        }
        progress.since_report = {name: progress.since_report.get(name, 0) + value for name, value in sums.items()}

    def _report(self, progress: Progress, outcome: Outcome, rate: float) -> None:
        sums, progress.since_report = progress.since_report, {}
        loss = sums["loss"] / sums["supervised"] if sums["supervised"] else float("nan")
        norm = outcome.gradient_norm.item()
        supervised, total = sums["supervised"] / sums["seconds"], sums["tokens"] / sums["seconds"]
        peak = mx.get_peak_memory()
        width = len(str(self.steps))
        self.log.event(
            "train",
            progress.step,
            f"step {progress.step:{width}d}/{self.steps}  loss {loss:7.4f}  lr {rate:.2e}  grad norm {norm:7.3f}  "
            f"tokens/s {supervised:6.0f} supervised {total:6.0f} all  peak {peak / 1e9:6.2f} GB",
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            supervised_tokens_per_second=supervised,
            tokens_per_second=total,
            supervised_tokens=progress.supervised_tokens,
            tokens=progress.tokens,
            seconds=progress.seconds,
            peak_memory=peak,
            active_memory=mx.get_active_memory(),
        )

    def _warn_skipped(self, state: State, progress: Progress, batches: list[Batch], rate: float) -> None:
        progress.skipped_updates += 1
        places = [self.train.examples[row].place for batch in batches for row in batch.rows]
        self.log.notice(
            "skipped",
            progress.step,
            f"step {progress.step}: the loss or gradient is not finite, update left out; rows {', '.join(places)}",
            rows=places,
        )
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self._save(state, progress, rate, required=True)
            raise InputError(
                f"{progress.skipped_in_a_row} updates in a row were not finite: lower train.learning_rate, or set "
                "model.dtype to bfloat16 or float32; the last good adapter is in "
                f"{self.folder / adapter_files.CHECKPOINTS}"
            )

    def _evaluate(self, adapter: dict[str, mx.array], progress: Progress, rate: float) -> None:
        """Scores the validation rows, keeps the adapter if it is the best so far, and answers the sample prompts."""
        lora.set_parameters(self.base.model, adapter)
        self.log.doing("evaluating")
        if self.valid_batches is not None:
            result = score(self.base.model, self.valid_batches, self._ahead)
            progress.valid_loss = result.loss
            better = math.isfinite(result.loss) and (progress.best_loss is None or result.loss < progress.best_loss)
            progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
            if better:
                progress.best_loss, progress.best_step = result.loss, progress.step
                self.best = adapter, self._metadata(progress, rate)
                try:
                    self._keep(*self.best)
                except InputError as error:
                    self._not_saved(progress, error)
            self.log.event(
                "eval",
                progress.step,
                f"eval at step {progress.step}: loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  "
                f"on {result.tokens} tokens{'  (best)' if better else ''}",
                loss=result.loss,
                perplexity=result.perplexity,
                tokens=result.tokens,
                best=better,
            )
        for prompt in self.config.eval.samples:
            answer = self._answer(prompt)
            if prompt not in self._base_answers:
                lora.disable(self.base.model)
                try:
                    self._base_answers[prompt] = self._answer(prompt)
                finally:
                    lora.enable(self.base.model)
            base = self._base_answers[prompt]
            line = f"  {quoted(prompt)}\n    base   {quoted(base)}\n    tuned  {quoted(answer)}"
            self.log.event("sample", progress.step, line, prompt=prompt, answer=answer, base=base)

    def _answer(self, prompt: str) -> str:
        """The greedy answer to a prompt."""
        tokens = generation.prompt_tokens(self.base.tokenizer, prompt)
        return "".join(generation.stream(self.base.model, self.base.tokenizer, tokens, self.config.eval.sample_tokens))

    def _due(self, progress: Progress) -> bool:
        """Whether a checkpoint is to be written; after one that failed, with the next report at the latest."""
        every, (_, deaths) = self.config.checkpoint.every, before()
        if self._unsaved and progress.step % self.config.log.every == 0:
            return True
        if every != "auto":
            return progress.step % every == 0
        # Sooner after each death, or one that comes within a minute would let no life get further than the one before.
        wait = LOST_WORK / 4**deaths if deaths else max(LOST_WORK, self._save_seconds / SAVE_SHARE)
        return time.monotonic() - self._saved_at >= wait

    def _save(self, state: State, progress: Progress, rate: float, required: bool = False) -> None:
        """Writes a checkpoint. Raises InputError where that fails and it is `required`; else it is said."""
        begin = time.monotonic()
        try:
            if self.valid_batches is None:
                self._keep(state.adapter, self._metadata(progress, rate))
            elif self._unsaved and self.best is not None:
                self._keep(*self.best)
            with files.writing(self.folder):
                checkpoint.save(
                    self.folder,
                    state,
                    self.best,
                    progress,
                    self.settings,
                    self.contract,
                    self._metadata(progress, rate),
                    self.config.checkpoint.keep,
                )
        except InputError as error:
            if required:
                raise InputError(f"{error}: mend it, then go on with --resume") from None
            self._not_saved(progress, error)
        else:
            self._unsaved = False
            self._save_seconds = time.monotonic() - begin
            self.log.record("saved", progress.step, seconds=self._save_seconds)
        self._saved_at = time.monotonic()

    def _not_saved(self, progress: Progress, error: InputError) -> None:
        self._unsaved = True
        self.log.notice("not_saved", progress.step, f"warning: {error}; training goes on", reason=str(error))

    def _keep(self, adapter: dict[str, mx.array], metadata: dict[str, str]) -> None:
        """Puts the adapter where other tools look for it: in the run's folder."""
        with files.writing(self.folder):
            mlx_form.save(self.folder, adapter, self.settings, metadata)

    def _metadata(self, progress: Progress, rate: float) -> dict[str, str]:
        return {
            "format": "mlx",
            "step": str(progress.step),
            "loss": str(progress.loss),
            "valid_loss": str(progress.valid_loss),
            "learning_rate": f"{rate:.6g}",
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **{f"base_{name}": value for name, value in self.base.identity.items()},
            "train_rows": self.train.digest,
            "valid_rows": self.valid.digest if self.valid else "",
            **{f"notes.{name}": text for name, text in self.config.notes.items()},
        }

    def _result(self, progress: Progress) -> Result:
        final = progress.valid_loss if progress.valid_loss is not None else progress.loss
        assert final is not None
        return Result(
            final_loss=final,
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            steps=progress.step,
            epochs=progress.step / self.batches.steps_per_epoch,
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            seconds=progress.seconds,
            output_dir=self.folder,
        )


def total_steps(config: Config, batches: Batches) -> int:
    """Optimizer updates of the run: all epochs, or `max_steps` if that is fewer or there is no number of epochs."""
    options = config.train
    limits = [options.max_steps] if options.max_steps is not None else []
    if options.epochs is not None:
        limits.append(options.epochs * batches.steps_per_epoch)
    return min(limits)


def quoted(text: str) -> str:
    """A text on one line of the console; the whole is in metrics.jsonl."""
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


def base_answers(events: list[dict[str, Any]]) -> dict[str, str]:
    """What the base answered to the sample prompts of a run."""
    samples = [event for event in events if event["event"] == "sample"]
    return {event["prompt"]: event["base"] for event in samples if "prompt" in event and "base" in event}


class _Signals:
    """Notes the first SIGINT, SIGTERM or SIGHUP (a closed terminal) for the loop to act on between steps; a second
    SIGINT or SIGTERM acts at once."""

    received: int | None = None

    def __enter__(self) -> "_Signals":
        self._kept: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self._kept[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        if number == signal.SIGHUP:  # some shells send two
            metrics.leave_terminal()
        for each in self._kept.keys() - {signal.SIGHUP}:
            signal.signal(each, signal.SIG_DFL)
