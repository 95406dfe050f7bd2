"""The whole job: data, teachers, students, evaluation, in one run folder.

    OUT/config.json, environment.json          what ran, where
    OUT/teachers/T/                            best.safetensors, last.safetensors, metrics.jsonl, TensorBoard events, outcome.json
    OUT/students/METHOD-seedN/                 the same; checkpoint.pt while in training
    OUT/results.json, results.txt              the final table

What is finished is kept and reused; what is unfinished is gone on with (`--resume`) or refused, never overwritten.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.config import Command, Config, Training, require_same_config, write_config
from ensdistill.data.beton import DataSet, prepare
from ensdistill.data.feed import Feed
from ensdistill.data.sources import open_source
from ensdistill.display import Screen
from ensdistill.environment import environment
from ensdistill.errors import UserError
from ensdistill.evaluate import predict
from ensdistill.export import NetworkInfo, load_network, save_network
from ensdistill.files import atomic_write
from ensdistill.loop import Loop, Progress
from ensdistill.methods import Method
from ensdistill.metrics import accuracy, ensemble_log_probs, measures, nll
from ensdistill.models import Classifier, build
from ensdistill.schedule import Schedule
from ensdistill.step import Precision, State, StepConfig, make_optimizer
from ensdistill.stop import Stop
from ensdistill.students import BatchEnsembleStudent, Student, build_student
from ensdistill.teachers import Teachers, load_teachers

_STUDENT_SEEDS = 1000  # student n draws from config.seed + 1000 + n, teacher t from config.seed + t


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One network that is done, as files."""

    name: str
    """`teacher 0`, `latentbe+tdiv-sdiv`."""
    seed: int
    """The n of student n; 0 for a teacher."""
    folder: Path
    """Its folder in the run folder."""
    progress: Progress
    """Epochs, best and last validation, time."""


class Job:
    """A command that is checked and ready to run: everything that can be wrong with it has been said by now."""

    def __init__(self, command: Command, screen: Screen, stop: Stop) -> None:
        self.command, self.config, self.screen, self.stop = command, command.config, screen, stop
        self.device = choose_device(command.device)
        self.precision: Precision = choose_precision(self.config.precision, self.device)
        if command.threads is not None:
            torch.set_num_threads(command.threads)
        self.out = command.out or Path("runs") / self.config.recipe
        require_same_config(self.out, self.config)
        self._refuse_unfinished()
        source = open_source(self.config.source, self.config.data)
        write_config(self.out / "config.json", self.config)  # the first write: says at once where one may not write
        with screen.counting(f"{self.config.source}: writing .beton") as counter:
            folder = self.out.parent / "data" / self.config.source
            self.data: DataSet = prepare(source, folder, image_size=self.config.image_size, progress=counter)
        self._feeds: dict[tuple[str, int], Feed] = {}
        self._require_fitting_data()
        self.foreign_teachers = self._load_foreign_teachers() if self.config.teachers else None
        with atomic_write(self.out / "environment.json") as temporary:
            temporary.write_text(json.dumps(environment(self.device, self.precision), indent=2) + "\n")

    def _refuse_unfinished(self) -> None:
        unfinished = sorted(self.out.glob("*/*/checkpoint.pt"))
        if unfinished and not self.command.resume and self.command.stage != "evaluate":
            raise UserError(
                f"{unfinished[0].parent}: holds an unfinished run; add --resume to go on with it, or choose another --out"
            )

    def _require_fitting_data(self) -> None:
        config = self.config
        if self.data.image_shape is None and config.image_size is None:
            raise UserError(
                f"{config.source}: the images have many sizes; give --image-size N (and --crop random-resized to train on crops)"
            )
        H, W, _ = self.image_shape
        if config.crop == "pad" and config.pad >= min(H, W):
            raise UserError(f"pad: got {config.pad}, expected less than the images' side, {min(H, W)} pixels")
        for training in (config.teacher, config.student):
            self.train_feed(training.batch_size, seed=0)

    def _load_foreign_teachers(self) -> Teachers:
        config, data = self.config, self.data
        teachers = load_teachers(
            config.teachers,
            num_classes=data.num_classes,
            image_shape=self.image_shape,
            builder=config.teacher_builder,
            builder_args=json.loads(config.teacher_args),
            pixel_mean=data.pixel_mean,
            pixel_std=data.pixel_std,
        )
        if config.members != teachers.E:
            raise UserError(
                f"members: {config.members}, but --teachers gives {teachers.E}; each member has one teacher: "
                f"give --members {teachers.E}"
            )
        return teachers.to(self.device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) that the networks see."""
        if self.config.crop == "random-resized" or self.data.image_shape is None:
            assert self.config.image_size is not None
            return (self.config.image_size, self.config.image_size, 3)
        return self.data.image_shape

    def train_feed(self, batch_size: int, seed: int) -> Feed:
        """The shuffled training images."""
        feed = self._feed("train", batch_size)
        feed.seed = seed
        return feed

    def eval_feed(self, split: str) -> Feed:
        """Every image of `split`, in order."""
        return self._feed(split, self.config.student.batch_size)

    def _feed(self, split: str, batch_size: int) -> Feed:
        key = (split, batch_size)
        if key not in self._feeds:
            train, config = split == "train", self.config
            indices = self.data.indices[split]
            if train and config.train_images is not None:
                first = range(self.data.counts["train"]) if indices is None else indices
                if config.train_images > len(first):
                    raise UserError(f"train-images: got {config.train_images}, but there are {len(first)}; give fewer")
                indices = first[: config.train_images]
            crop = "none" if self.data.image_shape is not None else "center"
            self._feeds[key] = Feed(
                self.data.paths[split],
                indices=indices,
                batch_size=batch_size,
                seed=0,
                shuffle=train,
                drop_last=train,
                image_size=None if crop == "none" and config.crop == "pad" else config.image_size,
                crop="random-resized" if train and config.crop == "random-resized" else crop,
            )
        return self._feeds[key]

    def make_classifier(self, seed: int) -> Classifier:
        """A fresh network behind its normalisation."""
        H, _, C = self.image_shape
        network = build(
            self.config.network, num_classes=self.data.num_classes, in_channels=C, image_size=H, seed=seed
        )
        return Classifier(network, self.data.pixel_mean, self.data.pixel_std)

    def teacher_folders(self) -> list[Path]:
        """Where each teacher of our own lies or will lie."""
        return [self.out / "teachers" / str(t) for t in range(self.config.members)]

    def student_folder(self, method: Method, n: int) -> Path:
        """Where student n of `method` lies or will lie."""
        return self.out / "students" / f"{method}-seed{n}"

    def load_teachers(self) -> Teachers:
        """The teachers to learn from, those of `--teachers` or our own.

        Raises:
            UserError: one of ours is not trained yet.
        """
        if self.foreign_teachers is not None:
            return self.foreign_teachers
        for folder in self.teacher_folders():
            if not (folder / "outcome.json").exists():
                raise UserError(f"{folder}: this teacher is not trained yet; run --stage teachers, or give --teachers PATH…")
        return load_teachers(
            [folder / "best.safetensors" for folder in self.teacher_folders()],
            num_classes=self.data.num_classes,
            image_shape=self.image_shape,
        ).to(self.device)

    def train_teachers(self) -> None:
        """Train every teacher that is not there yet, on labels."""
        if self.foreign_teachers is not None:
            return
        method = Method(student="ce")
        for t, folder in enumerate(self.teacher_folders()):
            title = f"teacher {t + 1}/{self.config.members}"
            self._train(method, self.config.teacher, title=title, seed=self.config.seed + t, folder=folder, teachers=None)

    def train_students(self) -> None:
        """Distil every student that is not there yet."""
        teachers = self.load_teachers()
        for n in range(self.command.seeds):
            for text in self.config.methods:
                method = Method.parse(text)
                self._train(
                    method,
                    self.config.student,
                    title=text if self.command.seeds == 1 else f"{text} {n + 1}/{self.command.seeds}",
                    seed=self.config.seed + _STUDENT_SEEDS + n,
                    folder=self.student_folder(method, n),
                    teachers=teachers if method.needs_teachers else None,
                )

    def _train(
        self, method: Method, training: Training, *, title: str, seed: int, folder: Path, teachers: Teachers | None
    ) -> None:
        if (folder / "outcome.json").exists():
            self.screen.say(f"{title}: already trained ({folder})")
            return
        config = self.config
        feed = self.train_feed(training.batch_size, seed)
        student = build_student(method, self.make_classifier, E=config.members, seed=seed).to(self.device)
        state = State(
            student=student,
            teachers=teachers,
            optimizer=make_optimizer(student, training.weight_decay, config.factor_rate),
        )
        step_config = StepConfig(
            method=method,
            seed=seed,
            tau=config.tau,
            alpha=config.alpha,
            weight_decay=training.weight_decay,
            pad=config.pad if config.crop == "pad" else 0,
            flip=config.flip,
            precision=self.precision,
        )
        steps = training.epochs * feed.num_steps
        schedule = Schedule(
            peak=training.lr, warmup_steps=round(training.warmup_epochs * feed.num_steps), total_steps=steps
        )
        checkpoint = folder / "checkpoint.pt"
        first_step = checkpoint_step(checkpoint) if checkpoint.exists() else 0
        with self.screen.training(title, epochs=training.epochs, steps=steps, first_step=first_step) as display:
            gap = AveragingWatch(self.screen, title)
            Loop(
                state=state,
                config=step_config,
                schedule=schedule,
                feed=feed,
                epochs=training.epochs,
                folder=folder,
                validate=lambda: gap.watch(self.validate(student)),
                ship=lambda path: self.ship(student, method, path),
                display=display,
                stop=self.stop,
                device=self.device,
                log_every=self.command.log_every,
            ).run()

    def validate(self, student: Student) -> dict[str, float]:
        """Accuracy and NLL on the validation images of what `student` ships; of its members too where it has any."""
        feed = self.eval_feed("valid")
        shipped = student.shipped()
        logits_NMK, labels_N = self.predict(shipped, feed)
        log_probs_NK = ensemble_log_probs(logits_NMK)
        values = {"acc": accuracy(log_probs_NK, labels_N), "nll": nll(log_probs_NK, labels_N)}
        if student.E > 1:
            if shipped is not student:
                logits_NMK, _ = self.predict(student, feed)
            values |= member_values(logits_NMK, labels_N)
        return values

    def predict(self, network: nn.Module, feed: Feed) -> tuple[Tensor, Tensor]:
        """Logits (N, M, K) in float32 and labels (N,) of every image of `feed`, in evaluation mode, on the CPU."""
        return predict(network.eval(), feed, device=self.device, precision=self.precision)

    def run(self) -> None:
        """The stages that the command asks for, and the table."""
        from ensdistill.report import report  # imports this module

        if self.command.stage in ("teachers", "all"):
            self.train_teachers()
        if self.command.stage in ("distill", "all"):
            self.train_students()
        report(self)


def member_values(logits_NMK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """The members' mean accuracy and NLL, each by itself, and those of their ensemble (the mean of probabilities)."""
    singles = [ensemble_log_probs(logits_NMK[:, m : m + 1]) for m in range(logits_NMK.shape[1])]
    ensemble_NK = ensemble_log_probs(logits_NMK)
    return {
        "members_acc": sum(accuracy(single, labels_N) for single in singles) / len(singles),
        "members_nll": sum(nll(single, labels_N) for single in singles) / len(singles),
        "ensemble_acc": accuracy(ensemble_NK, labels_N),
        "ensemble_nll": nll(ensemble_NK, labels_N),
    }
