"""The whole job: data, teachers, students, evaluation, in one run folder.

    OUT/config.json, environment.json     what ran, where
    OUT/data.json                         what it was trained on
    OUT/teachers/T/                       best.safetensors, last.safetensors, metrics.jsonl, TensorBoard events,
                                          outcome.json
    OUT/students/METHOD-seedN/            the same; best-student.safetensors with the members' factors; checkpoint.pt in
                                          training
    OUT/*/*/passes.json                   how PyTorch's modules were computed, where there was a choice (computing.py)
    OUT/results.json, results.txt         the final table
    OUT/report.html                       the report, and what it draws beside the table (report/records.py)

What is finished is kept and reused; what is unfinished is gone on with (`--resume`) or refused, never overwritten;
neither on other data than it was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ensdistill.config.configs import Command, Training, require_same_config, write_config
from ensdistill.config.methods import Method
from ensdistill.costs.dry_run import needs_no_values, precision_of_gradients, teachers_without_values
from ensdistill.costs.memory import Workload, capacity, require_room
from ensdistill.costs.memory import predict as predict_memory
from ensdistill.costs.network import network_cost
from ensdistill.data.dataset import DataSet, training_rows
from ensdistill.data.feed import Crop, Feed
from ensdistill.data.inputs import is_resident
from ensdistill.data.prepare import folder_for, prepare, refuse_within
from ensdistill.data.sources.registry import open_source
from ensdistill.engine.cpu.side_by_side import crew_for
from ensdistill.engine.operations import make_operations
from ensdistill.formats.load import find_files, load_teachers
from ensdistill.formats.ours import NetworkInfo, load_network, load_student, save_network
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import BatchEnsembleStudent, Student, build_student
from ensdistill.monitor.memory import Prediction
from ensdistill.run import preflight
from ensdistill.run.computing import require_compiler
from ensdistill.run.display import Screen
from ensdistill.run.metrics import accuracy, ensemble_log_probs, member_values, nll
from ensdistill.run.predict import predict
from ensdistill.run.trained_on import compared_fields, require_same_data, require_same_teachers, write_record
from ensdistill.runtime.environment import (
    Precision,
    choose_device,
    choose_precision,
    choose_threads,
    commit,
    environment,
    is_tiny,
    versions,
)
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import (
    FolderLock,
    atomic_write,
    delete_leftovers,
    lock_folder,
    read_json,
    require_digest,
    writing,
)
from ensdistill.runtime.ranks import ALONE, Ranks, mark_begun, was_begun
from ensdistill.runtime.stop import Stop
from ensdistill.training.averaging import measure_statistics
from ensdistill.training.from_config import make_classifier, step_config
from ensdistill.training.loop import Progress
from ensdistill.training.step import StepConfig

_STUDENT_SEEDS = 1000  # teacher t draws from seed + t, student n from seed + 1000 + n


@dataclass(frozen=True, kw_only=True)
class Run:
    """One network to train, or trained."""

    title: str
    """Name in the display."""
    method: Method
    """Student, and the data that it is shown."""
    training: Training
    """Schedule and batch size."""
    seed: int
    """Key of every random draw."""
    folder: Path
    """Folder of its files."""
    is_student: bool
    """False for a teacher."""

    @property
    def memory_key(self) -> tuple[Method, int, bool]:
        """Key of the predicted memory: runs that share it take the same."""
        return self.method, self.training.batch_size, self.is_student

    @property
    def is_done(self) -> bool:
        """True once it is trained to the end."""
        return (self.folder / "outcome.json").exists()

    def outcome(self) -> Progress:
        """Read the record of the finished training.

        Raises:
            UserError: it is not finished, or the record is none.
        """
        path = self.folder / "outcome.json"
        try:
            return Progress.from_values(require_digest(read_json(path)))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not the end of a training ({error}); delete {self.folder} to train it again"
            ) from error


class Job:
    """A command that is checked and ready to run: whatever can be wrong with it has been said by now."""

    def __init__(self, command: Command, screen: Screen, stop: Stop, ranks: Ranks = ALONE) -> None:
        self.command, self.config, self.screen, self.stop = command, command.config, screen, stop
        self.ranks = ranks
        self.device = choose_device(command.device)
        if self.device.type == "cuda" and ranks.size > 1:
            self.device = torch.device("cuda", ranks.local_rank)
        if self.device.index is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # what asks for no device in particular gets this one
        self.precision: Precision = choose_precision(self.config.precision, self.device)
        ranks.require_same({"--precision": self.precision})  # of machines of several kinds
        make_operations(self.config.backend, self.device)  # says here, before anything is written, if it cannot
        if command.compile == "yes" and command.stage != "evaluate":
            require_compiler(self.device)
        for batch_size in {self.config.teacher.batch_size, self.config.student.batch_size}:
            ranks.share(batch_size)  # says if it cannot be
        self.out = command.out or Path("runs") / self.config.recipe
        self._lock: FolderLock | None = None
        ranks.first(lambda: self._lock_folder() if (self.out / "config.json").exists() else None)
        require_same_config(self.out, self.config, compared_fields(self.out, self.config))
        if not command.resume and command.stage != "evaluate" and not was_begun(str(self.out.resolve())):
            preflight.refuse_unfinished(self.out)
        mark_begun(str(self.out.resolve()))
        # Whatever needs no data is refused before they are written, which may take an hour.
        data_root = self.out.parent / "data"
        for place in (self.out, data_root):
            refuse_within(self.config.data, self.config.source, place, f"--out {self.out}")
        if self.config.teachers:
            find_files(self.config.teachers)
        if self.config.builder is None:
            require_room(self.config.network, self.config.members)
        preflight.require_image_size(self.config, vary=False)
        source = open_source(self.config.source, self.config.data)
        # the first write: says at once where one may not
        ranks.first(self._begin_folder)
        ranks.first(lambda: require_same_data(self.out, source, self.config.image_size, screen.say))
        with screen.counting(f"{self.config.source}: writing .beton") as counter:

            def prepared() -> DataSet:
                folder = folder_for(data_root, source, self.config.image_size)
                return prepare(
                    source,
                    folder,
                    image_size=self.config.image_size,
                    one_size=self.config.image_size is None,
                    progress=counter,
                )

            self.data = ranks.first(prepared)
        preflight.require_same_files(self)
        if self.config.optimizer != "sgd":
            screen.say(f"{self.config.optimizer}: {preflight.rates_in_words(self.config)}")
        if self.data.note:
            screen.say(f"{self.config.source}: {self.data.note}")
        self._feeds: dict[tuple[str, int], Feed] = {}
        preflight.require_fitting_images(self)
        feeds = [self.train_feed(B, seed=0) for B in (self.config.teacher.batch_size, self.config.student.batch_size)]
        self.images_are_resident = is_resident(feeds[0], self.device, command.cache)
        preflight.require_fitting_network(self)
        self.precision = precision_of_gradients(
            self.precision,
            self.make_classifier(0),
            self.image_shape,
            device=self.device,
            asked=self.config.precision,
            say=screen.say,
        )
        H, W, C = self.image_shape
        with needs_no_values(self.config):
            cost = network_cost(self.make_classifier(0).network, in_channels=C, image_size=(H, W))
        B = self.config.student.batch_size
        threads = choose_threads(command.threads, layer_macs=B * cost.macs_a_layer)
        if (asked := command.threads) and asked > threads:
            screen.say(f"--threads {asked}: {threads} used, for this process has no more cores")
        torch.set_num_threads(threads)
        tiny = is_tiny(B * cost.macs_a_layer)
        self.crew = crew_for(self.config.backend, self.device, threads, tiny=tiny)
        self._foreign_teachers = self._load_foreign_teachers() if self.config.teachers else None
        preflight.require_outcomes(self)
        preflight.require_space(self)
        with needs_no_values(self.config):
            self._predictions = preflight.require_memory(self)
        ranks.first(self._write_facts)
        stop.check()  # a compiler may have swallowed what a signal raised

    def _lock_folder(self) -> None:
        self._lock = lock_folder(self.out)
        if not self._lock.is_held:
            self.screen.say(f"{self.out}: its file system knows no locks; start no second run in it meanwhile")

    def _begin_folder(self) -> None:
        if self._lock is None:
            self._lock_folder()
        self._delete_leftovers()

    def _delete_leftovers(self) -> None:
        """Delete what killed processes have left and nobody would write again."""
        delete_leftovers(self.out, "**/")
        delete_leftovers(self.out.parent / "data", "*/")  # where others may be at work: what they write is locked
        for checkpoint in self.out.glob("*/*/checkpoint.pt"):
            if checkpoint.with_name("outcome.json").exists():
                with writing(checkpoint):
                    checkpoint.unlink()

    def _write_facts(self) -> None:
        write_config(self.out / "config.json", self.config)
        write_record(self.out, self.data, self._foreign_teachers)
        facts = environment(self.device, self.precision) | {"processes": self.ranks.size}
        with atomic_write(self.out / "environment.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def room(self, run: Run) -> int:
        """Bytes of the device that the training `run` can have."""
        feed = self.train_feed(run.training.batch_size, run.seed)
        return capacity(self.device) - feed.num_bytes * self.images_are_resident

    def prediction(self, run: Run) -> Prediction:
        """Predicted memory of the training `run`, on its device."""
        if run.memory_key not in self._predictions:
            rows = len(self.ranks.share(run.training.batch_size))
            self._predictions[run.memory_key] = predict_memory(self.workload(run), rows)
        return self._predictions[run.memory_key]

    def workload(self, run: Run) -> Workload:
        """Networks, method and backend of `run`, whose memory is predicted."""
        return Workload(
            # beside a student they are there, whether it needs them or not
            teachers=self._teachers_without_values() if run.is_student else None,
            student=self.make_student(run),
            method=run.method,
            image_shape=self.image_shape,
            precision=self.precision,
            backend=self.config.backend,
            device_type=self.device.type,
            updates=self.config.updates,
        )

    def _teachers_without_values(self) -> Teachers:
        """Teachers as many as there will be, trained or not."""
        if self._foreign_teachers is not None:
            return self._foreign_teachers
        return teachers_without_values(self.make_classifier(0), self.config.members, self.data.num_classes)

    def _load_foreign_teachers(self) -> Teachers:
        config, data = self.config, self.data
        teachers = load_teachers(
            config.teachers,
            num_classes=data.num_classes,
            image_shape=self.image_shape,
            builder=config.teacher_builder,
            builder_args=config.teacher_args,
            pixel_mean=data.pixel_mean,
            pixel_std=data.pixel_std,
            class_names=data.class_names,
            say=self.screen.say,
            warn=self.screen.warn,
        )
        if config.members != teachers.E:
            raise UserError(
                f"members: got {config.members}, but --teachers gives {teachers.E}, and each member has one teacher; "
                f"give --members {teachers.E}"
            )
        self.ranks.first(lambda: require_same_teachers(self.out, teachers))
        return teachers.to(self.device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) that the networks see."""
        if self.data.image_shape is not None and self.config.crop == "pad":
            return self.data.image_shape
        assert self.config.image_size is not None
        return (self.config.image_size, self.config.image_size, self.data.num_channels)

    def train_feed(self, batch_size: int, seed: int) -> Feed:
        """Training images in a shuffled order."""
        return self._feed("train", batch_size).with_seed(seed)

    def eval_feed(self, split: str) -> Feed:
        """Images of `split`, all of them, in order."""
        return self._feed(split, self.config.student.batch_size)

    def _feed(self, split: str, batch_size: int) -> Feed:
        if (split, batch_size) not in self._feeds:
            stored, config, is_train = self.data.splits[split], self.config, split == "train"
            indices = training_rows(self.data, config.train_images) if is_train else stored.indices
            crop: Crop = "center"
            if self.data.image_shape is not None and (config.crop == "pad" or not is_train):
                crop = "none"  # images of the size that is trained on are measured whole
            elif is_train and config.crop == "random-resized":
                crop = "random-resized"
            self._feeds[split, batch_size] = Feed(
                stored.path,
                indices=indices,
                batch_size=batch_size,
                seed=0,
                shuffle=is_train,
                drop_last=is_train,
                image_size=None if crop == "none" else config.image_size,
                crop=crop,
                cache="auto" if self.command.cache == "gpu" else self.command.cache,
                share=self.ranks.share(batch_size) if is_train else None,
                pin=is_train and self.device.type == "cuda",
            )
        return self._feeds[split, batch_size]

    def make_classifier(self, seed: int) -> Classifier:
        """A fresh network behind its normalisation."""
        data = self.data
        return make_classifier(
            self.config,
            num_classes=data.num_classes,
            image_shape=self.image_shape,
            pixel_mean=data.pixel_mean,
            pixel_std=data.pixel_std,
            seed=seed,
        )

    def make_student(self, run: Run) -> Student:
        """A fresh student on the device."""
        student = build_student(run.method, self.make_classifier, E=self.config.members, seed=run.seed)
        return student.to(self.device)

    def teacher_runs(self) -> list[Run]:
        """The teachers of our own; none where `--teachers` gives others."""
        if self._foreign_teachers is not None:
            return []
        E = self.config.members
        return [
            Run(
                title=f"teacher {t + 1}/{E}",
                method=Method(student="ce"),
                training=self.config.teacher,
                seed=self.config.seed + t,
                folder=self.out / "teachers" / str(t),
                is_student=False,
            )
            for t in range(E)
        ]

    def student_runs(self) -> list[Run]:
        """The students that the command asks for, seed by seed."""
        N = self.command.seeds
        return [
            Run(
                title=text if N == 1 else f"{text} {n + 1}/{N}",
                method=Method.parse(text),
                training=self.config.student,
                seed=self.config.seed + _STUDENT_SEEDS + n,
                folder=self.out / "students" / f"{text}-seed{n}",
                is_student=True,
            )
            for n in range(N)
            for text in self.config.methods
        ]

    def load_teachers(self) -> Teachers:
        """The teachers to learn from, those of `--teachers` or our own.

        Raises:
            UserError: one of ours is not trained yet.
        """
        if self._foreign_teachers is not None:
            return self._foreign_teachers
        runs = self.teacher_runs()
        for run in runs:
            if not run.is_done:
                raise UserError(
                    f"{run.folder}: this teacher is not trained yet; "
                    "run --stage teachers first, or give --teachers PATH…"
                )
        paths = [run.folder / "best.safetensors" for run in runs]
        teachers = load_teachers(
            paths, num_classes=self.data.num_classes, image_shape=self.image_shape, builder=self.config.builder
        )
        return teachers.to(self.device)

    def step_config(self, run: Run) -> StepConfig:
        """Configuration of a training step of `run`."""
        return step_config(self.config, run.method, run.training, run.seed)

    def validate(self, student: Student) -> dict[str, float]:
        """Accuracy and NLL on the validation images of what `student` ships, and of its members where it has any."""
        feed = self.eval_feed("valid")
        logits_NMK, labels_N = self.predict(student, feed, self.ranks)
        values = member_values(logits_NMK, labels_N) if student.E > 1 else {}
        if factors := student.factors():
            values["largest_rho"] = max(rho.detach().abs().max().item() for rho in factors)
        if isinstance(student, BatchEnsembleStudent) and student.average:
            logits_NMK, _ = self.predict(student.shipped(), feed, self.ranks)
        log_probs_NK = ensemble_log_probs(logits_NMK)
        return values | {"acc": accuracy(log_probs_NK, labels_N), "nll": nll(log_probs_NK, labels_N)}

    def predict(self, network: nn.Module, feed: Feed, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        """Logits (N, M, K) in float32 and labels (N,) of every image of `feed`, in evaluation mode, on the CPU.

        `ranks` share the images.
        """
        return predict(network.eval(), feed, device=self.device, precision=self.precision, ranks=ranks, crew=self.crew)

    def info(self, run: Run, averaged: str = "") -> NetworkInfo:
        """Description in the file of a network of this run, as far as it is known before the network is measured.

        `averaged`: what average of the run's weights over time it is, if it is one.
        """
        return NetworkInfo(
            architecture=self.config.network,
            arguments=self.config.builder_arguments(),
            class_names=self.data.class_names,
            image_shape=self.image_shape,
            pixel_mean=self.data.pixel_mean,
            pixel_std=self.data.pixel_std,
            method=str(run.method),
            averaged=averaged,
            recipe=self.config.recipe,
            commit=commit(),
            versions=versions(),
        )

    def load_student(self, run: Run, path: Path) -> Student:
        """The student whose shipped network lies at `path`, with its members.

        Raises:
            UserError: the file beside `path` is missing, damaged or another network's.
        """
        return load_student(self.make_student(run), path)

    def recalibrate(self, run: Run) -> None:
        """Write recalibrated.safetensors beside best.safetensors, where it is not there yet."""
        path = run.folder / "recalibrated.safetensors"
        if path.exists():
            return
        classifier, info = load_network(run.folder / "best.safetensors", builder=self.config.builder)
        feed = self.train_feed(run.training.batch_size, run.seed).whole()
        measure_statistics(classifier.to(self.device), feed, self.step_config(run))
        save_network(path, classifier.network, info)
