"""The training loop: one function a person can read, for every task, on one device or many.

Everything random is a function of (seed, step), so a run that was killed and resumed ends with the
same bits as one that never stopped. Losses stay on the device until a step that reports; a loss or
gradient that is not finite stops the run before anything is saved.
"""

from __future__ import annotations

import math
import platform
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fastformer import weights
from fastformer._checkout import version
from fastformer.train import checkpoint
from fastformer.train.config import Kind, RunError, TrainConfig, check_resumable, from_json, to_json
from fastformer.train.data import Purpose, derive_seed
from fastformer.train.folder import RunFolder, free_name, read_config
from fastformer.train.optim import build_optimizer, learning_rate
from fastformer.train.processes import (
    Interrupted,
    Share,
    StopRequest,
    ignore_interrupt,
    join_group,
)
from fastformer.train.report import Log, Screen, duration, plot_curves
from fastformer.train.shards import shard, whole
from fastformer.train.tasks import Task, Totals, build_task


class Diverged(RunError):
    """The loss or the gradient became infinite or NaN."""

    exit_code = 1


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    units: int = 0
    val_loss_start: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass
class Recent:
    """Loss and gradient norm of the steps since the last report, kept on the device."""

    steps: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.steps.append(step)
        self.values.append(torch.stack([loss.float(), norm.float()]))

    def drain(self) -> tuple[float, float]:
        """Mean loss and last gradient norm; raises Diverged at the first that is not finite."""
        values = torch.stack(self.values).tolist()
        for step, (loss, norm) in zip(self.steps, values, strict=True):
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise Diverged(f"the {name} became {value} at step {step}")
        losses = [loss for loss, _ in values]
        self.steps.clear()
        self.values.clear()
        return sum(losses) / len(losses), values[-1][1]


def _loader(data: Any, config: TrainConfig, sampler: range | None, device: torch.device) -> Any:
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator().manual_seed(0),
    )


@torch.no_grad()
def evaluate(
    task: Task, config: TrainConfig, share: Share, device: torch.device, screen: Screen
) -> tuple[float, float | None]:
    """Mean loss and, for tasks that have one, accuracy over the validation examples."""
    task.model.eval()
    totals = Totals()
    count = len(task.validation)
    mine = range(share.rank, count, share.world_size)
    with _autocast(config, device), screen.bar("validating", len(mine)) as progress:
        for done, batch in enumerate(_loader(task.validation, config, mine, device), start=1):
            inputs, targets = (t.to(device, non_blocking=True) for t in batch.values())
            task.measure(inputs, targets, totals)
            progress(done, len(mine))
    task.model.train()
    if share.world_size > 1:
        found = (totals.loss, totals.count, totals.correct)
        sums = torch.tensor(found, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        totals = Totals(float(sums[0]), int(sums[1]), int(sums[2]))
    accuracy = totals.correct / totals.count if task.has_accuracy else None
    return totals.loss / totals.count, accuracy


def _autocast(config: TrainConfig, device: torch.device) -> Any:
    dtype = config.autocast_dtype()
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def train(kind: Kind, config: TrainConfig) -> dict[str, Any]:
    """Train a model as `config` says; return what summary.json holds.

    `kind` is "bert", "gpt" or "vit"; `default_config(kind, preset)` gives a configuration.
    Raises RunError or DataError, each one clear line, for anything the user can mend; Diverged when
    the loss is no longer finite; Interrupted, after saving, on SIGINT or SIGTERM.
    """
    with join_group(config.torch_device()) as (share, device):
        out = share.agreed_path(config.out or free_name(Path("runs"), config.preset))
        config = replace(config, out=out)
        screen = Screen(silent=share.rank > 0)
        with RunFolder(out, config.resume, leader=share.rank == 0) as folder:
            return _Run(kind, config, folder, share, device, screen).run()


class _Run:
    """The state of one run, and its life from preparation to summary."""

    def __init__(
        self,
        kind: Kind,
        config: TrainConfig,
        folder: RunFolder,
        share: Share,
        device: torch.device,
        screen: Screen,
    ) -> None:
        self.kind, self.folder, self.share = kind, folder, share
        self.device, self.screen = device, screen
        stored = read_config(folder.path) if config.resume else None
        if config.resume and stored is None:
            raise RunError(f"--resume: there is no run in {folder.path}; check --out")
        self.config = config
        if stored is not None:
            self._announce_changes(stored)
        self.task = self._build_task(new=stored is None)
        if stored is not None and stored["data_sha256"] != self.task.data_sha256:
            raise RunError(
                f"--resume: the data is not what the run in {folder.path} began with;"
                " restore it, or start anew with another --out"
            )
        self.model: Any = self.task.model.to(device)
        if self.config.shard:
            if share.world_size == 1:
                raise RunError("--shard needs several processes; start the run with torchrun")
            shard(self.model)
        self.optimizer = build_optimizer(self.model, self.config)
        self.step, self.progress = 0, Progress()
        checkpoint.check_space(folder.path, self.model.num_parameters)
        self._restore()
        if share.rank == 0:
            self._describe()
        self.forward = self._wrapped_model()
        self.recent = Recent()
        # The state of all dropout: the seed, and the number of the batch in the upper 32 bits of
        # the offset; the lower bits belong to the sites within the model.
        seed = derive_seed(Purpose.DROPOUT, config.seed, share.rank)
        self.rng = torch.tensor([seed, 0], dtype=torch.int64, device=device)
        speed = f"{self.task.unit}_per_second"
        columns = ("step", "loss", "lr", "grad_norm", speed, "val_loss", "val_accuracy", "seconds")
        self.log = Log(folder, columns, self.step) if share.rank == 0 else None
        self._started = time.perf_counter() - self.progress.seconds

    def _announce_changes(self, stored: dict[str, Any]) -> None:
        if stored["kind"] != self.kind:
            raise RunError(
                f"--resume: {self.folder.path} holds a {stored['kind']} run;"
                f" use `fastformer train {stored['kind']}`"
            )
        before = from_json(self.kind, stored["train"])
        for change in check_resumable(before, self.config):
            self.screen.line(f"changed since the run began: {change}")

    def _build_task(self, new: bool) -> Task:
        """Build the task; the leader goes first, as it makes the tokenizer that the others load."""
        if self.share.rank > 0:
            dist.barrier()
        task = build_task(self.kind, self.config, self.folder, self.share, self.screen)
        if self.share.rank == 0 and new:
            task.save(self.folder)
        if self.share.rank == 0 and self.share.world_size > 1:
            dist.barrier()
        return task

    def _restore(self) -> None:
        if not self.config.resume:
            return
        newest, faults = checkpoint.load_newest(self.folder / "checkpoints")
        for fault in faults:
            self.screen.line(f"passed over: {fault}")
        if newest is None:
            self.screen.line("no checkpoint yet: starting at step 0")
            return
        checkpoint.restore(newest.tensors, self.model, self.optimizer, self.folder.path)
        self.step, self.progress = newest.step, Progress(**newest.progress)
        self.screen.line(f"going on from step {self.step:,}")

    def _describe(self) -> None:
        """Write config.json and tell what is about to happen."""
        self.folder.write_json(
            "config.json",
            {
                "kind": self.kind,
                "train": to_json(replace(self.config, resume=False)),
                "model": self.model.config.__dict__,
                "data_sha256": self.task.data_sha256,
                "versions": versions(),
            },
        )
        precision = str(self.config.autocast_dtype() or torch.float32).removeprefix("torch.")
        where = (
            f"{self.device.type}, {torch.get_num_threads()} threads"
            if self.device.type == "cpu"
            else torch.cuda.get_device_name(self.device)
        )
        many = f", {self.share.world_size} processes" if self.share.world_size > 1 else ""
        self.screen.line(
            f"{self.config.preset}: {self.model.num_parameters:,} parameters, {precision}"
            f" on {where}{many}"
        )
        for line in self.task.about:
            self.screen.line(line)
        self.screen.line(f"results: {self.folder.path}")

    def _wrapped_model(self) -> Any:
        model: Any = self.model
        if self.share.world_size > 1 and not self.config.shard:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=ids)
        return torch.compile(model) if self.config.compile else model

    def run(self) -> dict[str, Any]:
        """Train from where the run stands to its last step."""
        try:
            with StopRequest() as stop:
                self._train(stop)
        except Diverged as error:
            newest = checkpoint.list_checkpoints(self.folder / "checkpoints")
            kept = f"the last good checkpoint is {newest[0]}" if newest else "no checkpoint yet"
            raise Diverged(f"{error}; {kept}; try a lower --lr than {self.config.lr:g}") from None
        finally:
            if self.log is not None:
                self.log.close()
        return self._finish()

    def _train(self, stop: StopRequest) -> None:
        config, steps = self.config, self.config.steps
        if self.step >= steps:
            self.screen.line(f"already trained for {self.step:,} steps; raise --steps to go on")
            return
        if self.step == 0:
            self._validate()
        self.model.train()
        first = self.step * config.accumulate
        batches = iter(
            _loader(self.task.train, config, range(first, steps * config.accumulate), self.device)
        )
        with self.screen.bar("training", steps, start=self.step) as bar:
            mark, marked_step = time.perf_counter(), self.step
            while self.step < steps:
                lr = self._optimise(batches)
                bar(self.step, steps)
                last, report = self.step == steps, self.step % config.log_every == 0
                # Agreeing waits for the device: processes do it when they report, one always can.
                alone = self.share.world_size == 1
                stopped = stop.agreed(self.share, self.device) if alone or report else None
                validate = last or self.step % config.eval_every == 0
                save = last or self.step % config.checkpoint_every == 0 or stopped is not None
                if report or validate or save:
                    loss, norm = self.recent.drain()
                    passed = time.perf_counter() - mark
                    self.progress.training_seconds += passed
                    self._log_step(loss, norm, lr, passed / (self.step - marked_step))
                if validate and stopped is None:
                    self._validate()
                if save:
                    self._save()
                if stopped is not None:
                    name = signal.Signals(stopped).name
                    raise Interrupted(
                        f"{name}: saved at step {self.step:,}; go on with"
                        f" `fastformer train {self.kind} --out {self.folder.path} --resume`",
                        stopped,
                    )
                if not self.recent.steps:
                    mark, marked_step = time.perf_counter(), self.step

    def _optimise(self, batches: Iterator[dict[str, Tensor]]) -> float:
        """One optimiser step over `accumulate` batches; returns the learning rate it took."""
        config = self.config
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for micro in range(config.accumulate):
            batch = next(batches)
            inputs, targets = (t.to(self.device, non_blocking=True) for t in batch.values())
            self.rng[1] = (self.step * config.accumulate + micro) << 32
            with self._gradients_stay_local(micro + 1 < config.accumulate):
                with _autocast(config, self.device):
                    loss = self.forward(inputs, targets, rng=self.rng)
                (loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        parameters = list(self.model.parameters())
        if config.grad_clip:
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.progress.units += self.task.units_per_batch * config.accumulate * self.share.world_size
        self.recent.add(self.step, total, norm)
        return lr

    def _gradients_stay_local(self, local: bool) -> Any:
        """Until the last of several batches there is nothing to exchange between processes."""
        if self.config.shard:
            self.model.set_requires_gradient_sync(not local)
        elif local and self.share.world_size > 1:
            return self.forward.no_sync()
        return nullcontext()

    def _log_step(self, loss: float, norm: float, lr: float, seconds_per_step: float) -> None:
        self.progress.seconds = time.perf_counter() - self._started
        task, steps = self.task, self.config.steps
        units = task.units_per_batch * self.config.accumulate * self.share.world_size
        speed = units / seconds_per_step
        left = duration((steps - self.step) * seconds_per_step)
        width = len(str(steps))
        self.screen.line(
            f"step {self.step:>{width}}/{steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f}"
            f" | {speed:,.0f} {task.unit}/s | {1e3 * seconds_per_step:.0f} ms/step | ETA {left}"
        )
        if self.log is not None:
            values = {"loss": loss, "lr": lr, "grad_norm": norm, f"{task.unit}_per_second": speed}
            self.log.row(step=self.step, **values, seconds=self.progress.seconds)

    def _validate(self) -> None:
        """Measure the model, print and log it, and write a sample."""
        progress = self.progress
        # Processes that hold a part of the model each must all run it on every batch.
        share = Share() if self.config.shard else self.share
        loss, accuracy = evaluate(self.task, self.config, share, self.device, self.screen)
        if progress.val_loss_start is None:
            progress.val_loss_start = loss
        progress.val_loss, progress.val_accuracy = loss, accuracy
        progress.seconds = time.perf_counter() - self._started
        if self.log is None and not self.config.shard:
            return
        self.model.eval()
        with torch.no_grad(), _autocast(self.config, self.device):
            text = self.task.sample(self.device)
        self.model.train()
        if self.log is None:
            return
        shown = "" if accuracy is None else f" | val accuracy {accuracy:.2%}"
        self.screen.line(
            f"step {self.step:>{len(str(self.config.steps))}} | val loss {loss:.4f}{shown}"
        )
        extra = {} if accuracy is None else {"val_accuracy": accuracy}
        self.log.row(step=self.step, val_loss=loss, **extra, seconds=progress.seconds)
        self.log.sample(self.step, text)
        last = self.step >= self.config.steps
        for line in text.splitlines()[: 15 if last else 3]:
            self.screen.line(f"    {line[: self.screen.width - 4]}")

    def _save(self) -> None:
        if self.share.rank > 0 and not self.config.shard:
            return
        tensors = checkpoint.collect(self.model, self.optimizer)
        if self.share.rank == 0:
            self.progress.seconds = time.perf_counter() - self._started
            folder = self.folder / "checkpoints"
            folder.mkdir(exist_ok=True)
            checkpoint.save(folder, self.step, tensors, self.progress.__dict__)

    def _finish(self) -> dict[str, Any]:
        """Write the weights, the curves and the summary; tell where everything is."""
        summary = self._summary()
        tensors = {name: whole(p) for name, p in self.model.named_parameters()}
        if self.share.rank > 0:
            return summary
        path = self.folder / "model.safetensors"
        checkpoint.write_tensors(path, tensors, weights.header(self.model))
        curves = self.folder / "curves.png"
        plot_curves(self.folder / "log.csv", curves, self.config.preset)
        self.folder.write_json("summary.json", summary)
        start, end = summary["val_loss_start"], summary["val_loss"]
        accuracy = f", accuracy {summary['val_accuracy']:.2%}" if "val_accuracy" in summary else ""
        speed = summary[f"{self.task.unit}_per_second"]
        self.screen.line()
        self.screen.line(
            f"trained {summary['steps']:,} steps in {duration(summary['seconds'])}:"
            f" validation loss {start:.3f} -> {end:.3f}{accuracy},"
            f" {speed:,.0f} {self.task.unit}/s, {summary['peak_memory_mb']:,.0f} MB at the peak"
        )
        newest = checkpoint.list_checkpoints(self.folder / "checkpoints")[0]
        for about, file in (
            ("weights", path),
            ("checkpoint", newest),
            ("log", self.folder / "log.csv"),
            ("curves", curves),
            ("samples", self.folder / "samples.txt"),
            ("summary", self.folder / "summary.json"),
        ):
            self.screen.line(f"  {about:<11} {file}")
        return summary

    def _summary(self) -> dict[str, Any]:
        progress = self.progress
        summary: dict[str, Any] = {
            "kind": self.kind,
            "preset": self.config.preset,
            "parameters": self.model.num_parameters,
            "steps": self.step,
            "seconds": round(progress.seconds, 3),
            "val_loss_start": progress.val_loss_start,
            "val_loss": progress.val_loss,
        }
        if progress.val_accuracy is not None:
            summary["val_accuracy"] = progress.val_accuracy
        speed = progress.units / max(progress.training_seconds, 1e-9)
        summary[f"{self.task.unit}_per_second"] = round(speed, 1)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 1e6
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        return summary | {"peak_memory_mb": round(peak, 1), "versions": versions()}


def versions() -> dict[str, str]:
    """What a result depends on: fastformer, torch, Python and the machine."""
    return {
        "fastformer": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
