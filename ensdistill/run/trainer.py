"""Trains the runs of a job: builds what a loop needs, and says what came of it.

Teachers train one after another, or together as one member-batched network (training/together.py), whichever is faster
on the device; each becomes the same either way, up to the order of floating-point sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ensdistill.costs.dry_run import unmeasured_layers
from ensdistill.data.feed import Feed
from ensdistill.data.inputs import make_inputs
from ensdistill.engine.cpu.side_by_side import make_step_networks
from ensdistill.engine.modules.rehearsal import Compiling
from ensdistill.engine.networks import Networks
from ensdistill.engine.operations import make_operations
from ensdistill.formats.ours import ship
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import PlainStudent, Student
from ensdistill.models.synced_norm import synchronise_norms
from ensdistill.monitor.memory import Peak, gigabytes
from ensdistill.monitor.monitor import Monitor, source_of
from ensdistill.run.computing import compiling, write_passes
from ensdistill.run.job import Job, Run
from ensdistill.run.metrics import averaging_gap
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.ranks import ALONE
from ensdistill.runtime.timing import clock
from ensdistill.training.averaging import measure_statistics
from ensdistill.training.checkpoint import checkpoint_step
from ensdistill.training.from_config import make_state
from ensdistill.training.loop import Loop, Progress, Trainee
from ensdistill.training.optimizer import Schedule
from ensdistill.training.step import State, train_step
from ensdistill.training.stepper import CudaGraph, Stepper
from ensdistill.training.together import TeacherNetworks, TeachersInTraining, teachers_step

_TIMED_STEPS, _UNTIMED_STEPS = 20, 3


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One training: of one network, or of teachers together."""

    title: str
    """Name of the training in the display."""
    runs: Sequence[Run]
    """The networks: one, or teachers that train together."""
    networks: Networks
    """Teachers and student as the step asks them."""
    feed: Feed
    """Training images of the first run; the others have the same in orders of their own."""
    folder: Path
    """Folder that holds the checkpoint."""

    @property
    def seeds(self) -> list[int]:
        """Keys of the order of the images: one a network, where several train together."""
        return [run.seed for run in self.runs] if isinstance(self.networks, TeacherNetworks) else []

    @property
    def schedule(self) -> Schedule:
        """Learning rate of every step of the training."""
        training, num_steps = self.runs[0].training, self.feed.num_steps
        return Schedule(
            peak=training.lr,
            warmup_steps=round(training.warmup_epochs * num_steps),
            total_steps=training.epochs * num_steps,
        )


class Trainer:
    """Trains the networks of `job` that are not there yet."""

    def __init__(self, job: Job) -> None:
        self.job, self.screen = job, job.screen
        self._said: set[str] = set()

    def teachers(self) -> None:
        """Train every teacher, on labels."""
        runs = self.job.teacher_runs()
        folder = self.job.out / "teachers" / "together"
        begun = self.job.ranks.first(lambda: (folder / "checkpoint.pt").exists())
        if begun or self._trains_together(runs):
            self._train(self._together(runs, folder))
            return
        for run in runs:
            self._train_if_missing(run, None)

    def students(self) -> None:
        """Distil every student that is missing."""
        teachers = self.job.load_teachers()
        for run in self.job.student_runs():
            self._train_if_missing(run, teachers if run.method.needs_teachers else None)
            if self.job.config.recalibrate_bn and run.method.student == "latentbe":
                self.job.ranks.first(partial(self.job.recalibrate, run))

    def _train_if_missing(self, run: Run, teachers: Teachers | None) -> None:
        self.job.stop.check()
        if self.job.ranks.first(lambda: run.is_done):
            self.screen.say(f"{run.title}: already trained, {run.folder}")
        else:
            self._train(self._alone(run, teachers))

    def _alone(self, run: Run, teachers: Teachers | None) -> TrainingPlan:
        job, student = self.job, self.job.make_student(run)
        self._agree_on(student)
        networks = self._networks(run, teachers, student)
        feed = job.train_feed(run.training.batch_size, run.seed)
        return TrainingPlan(title=run.title, runs=[run], networks=networks, feed=feed, folder=run.folder)

    def _together(self, runs: Sequence[Run], folder: Path) -> TrainingPlan:
        job = self.job
        classifiers = [job.make_classifier(run.seed) for run in runs]
        operations = make_operations(job.config.backend, job.device)
        try:
            together = TeachersInTraining(classifiers, for_kernels=operations is not None).to(job.device)
        except ValueError as error:  # networks of somebody else's, drawn with different modules
            raise UserError(f"--teachers-together yes: {error}; choose no, or auto") from error
        networks = TeacherNetworks(together, job.precision, operations)
        self._agree_on(networks.student)
        feed = job.train_feed(runs[0].training.batch_size, runs[0].seed)
        title = f"teachers 1 to {len(runs)}"
        return TrainingPlan(title=title, runs=runs, networks=networks, feed=feed, folder=folder)

    def _networks(self, run: Run, teachers: Teachers | None, student: Student) -> Networks:
        job = self.job
        return make_step_networks(
            job.config.backend,
            teachers,
            student,
            job.precision,
            job.device,
            # a compiled pass has threads of its own
            crew=None if job.crew is None or self._compiling(run, run.folder) == "yes" else job.crew,
            rows=len(job.ranks.share(run.training.batch_size)),
            image_shape=job.image_shape,
        )

    def _agree_on(self, student: Student) -> None:
        """All processes start from one network, whatever built it."""
        self.job.ranks.broadcast_([tensor.detach() for tensor in student.state_dict().values()])
        if self.job.config.sync_bn:
            synchronise_norms(student, self.job.ranks)

    def _trains_together(self, runs: Sequence[Run]) -> bool:
        """Decide whether teachers that nobody has begun should train together."""
        job, asked = self.job, self.job.command.teachers_together
        begun = job.ranks.any(any(run.is_done or (run.folder / "checkpoint.pt").exists() for run in runs))
        if begun or len(runs) < 2 or asked == "no":
            return False
        needed, room = job.prediction(runs[0]).of_together(len(runs)).total, job.room(runs[0])
        if asked == "yes" and needed > room:
            raise UserError(
                f"--teachers-together yes: {len(runs)} teachers need about {gigabytes(needed)} of this device's "
                f"{gigabytes(room)}; choose no, or a smaller --teacher.batch-size"
            )
        if asked == "yes":
            return True
        # On a CPU one after another is the faster way (bench/steps/bench_teachers_together.py); a GPU is asked.
        return job.device.type == "cuda" and not job.ranks.any(needed > room) and self._is_faster_together(runs)

    def _is_faster_together(self, runs: Sequence[Run]) -> bool:
        together = self._together(runs, runs[0].folder)
        if together.networks.asks_modules("clean"):
            return False
        # every process takes part, for they share the steps; the first one's clock decides
        seconds = self._seconds(together)
        each = self._seconds(self._alone(runs[0], None))
        seconds, each = self.job.ranks.first(lambda: (seconds, each))
        is_faster = seconds < len(runs) * each
        self._say_once(
            f"teachers: {1e3 * seconds:.2f} ms a step together, {len(runs)} times {1e3 * each:.2f} ms one after "
            f"another: {'together' if is_faster else 'one after another'}"
        )
        return is_faster

    def _seconds(self, plan: TrainingPlan) -> float:
        """Measure the seconds of one step."""
        with closing(self._stepper(plan, self._state(plan))) as stepper:
            stepper.prepare(first_row=self.job.ranks.rank * plan.feed.rows)
            with stepper.inputs.epoch(0) as batches:
                steps = itertools.islice(batches, _UNTIMED_STEPS + _TIMED_STEPS)
                for ready in itertools.islice(steps, _UNTIMED_STEPS):
                    stepper(ready)
                start, first = clock(self.job.device), stepper.state.step
                for ready in steps:
                    stepper(ready)
            return (clock(self.job.device) - start) / max(1, stepper.state.step - first)

    def _train(self, plan: TrainingPlan) -> None:
        job = self.job
        self._say_notes(plan)
        prediction = job.prediction(plan.runs[0]).of_together(len(plan.runs))
        memory = Peak(job.device)
        state, schedule, epochs = self._state(plan), plan.schedule, plan.runs[0].training.epochs
        trainees = [self._trainee(plan, m, state, schedule) for m in range(len(plan.runs))]
        with (
            self.screen.training(
                plan.title,
                epochs=epochs,
                steps=schedule.total_steps,
                first_step=checkpoint_step(plan.folder / "checkpoint.pt"),
            ) as display,
            closing(self._stepper(plan, state)) as stepper,
        ):
            outcomes = Loop(
                state=state,
                stepper=stepper,
                prepared=partial(self._record_passes, plan, stepper),
                trainees=tuple(trainees),
                epochs=epochs,
                num_steps=plan.feed.num_steps,
                rows=plan.feed.rows,
                folder=plan.folder,
                display=display,
                monitor=self._monitor(plan.title),
                memory=memory,
                prediction=prediction,
                stop=job.stop,
                say=self._say_once,
                log_every=job.command.log_every,
            ).run()
        for run, outcome in zip(plan.runs, outcomes, strict=True):
            self.screen.say(f"{run.title}: {_in_words(outcome, epochs)}")
        if job.device.type == "cuda":  # a CPU's is the whole process's, and says little of one training
            self.screen.say(f"{plan.title}: {memory.text(prediction)}")

    def _state(self, plan: TrainingPlan) -> State:
        config, training = self.job.config, plan.runs[0].training
        return make_state(
            plan.networks,
            config.updates,
            weight_decay=training.weight_decay,
            factor_rate=config.factor_rate,
            ranks=self.job.ranks,
        )

    def _stepper(self, plan: TrainingPlan, state: State) -> Stepper:
        job, schedule = self.job, plan.schedule
        graph = None
        if job.device.type == "cuda" and job.command.capture:
            graph = CudaGraph(job.device, collectives=job.ranks.size > 1)
        return Stepper(
            state,
            job.step_config(plan.runs[0]),
            inputs=make_inputs(plan.feed, job.device, resident=job.images_are_resident, seeds=plan.seeds),
            rates=[schedule(step) for step in range(schedule.total_steps)],
            device=job.device,
            rows=job.command.log_every,
            graph=graph,
            compiling=self._compiling(plan.runs[0], plan.folder),
            function=teachers_step if plan.seeds else train_step,
            networks=len(plan.runs),
        )

    def _compiling(self, run: Run, folder: Path) -> Compiling:
        """Decide whether the modules of a training in `folder` are compiled, as the first process finds it."""
        job = self.job
        kin = [*job.teacher_runs(), *job.student_runs()]
        alike = [other.folder for other in kin if (other.method, other.training) == (run.method, run.training)]
        return job.ranks.first(lambda: compiling(job.command.compile, folder, alike, job.device))

    def _record_passes(self, plan: TrainingPlan, stepper: Stepper) -> None:
        """Keep how modules are computed, where there was a choice; say where there was nothing to compile."""
        trial = stepper.trial
        if trial is None and self.job.command.compile == "yes":
            self._say_once("--compile yes: the kernels compute every network here, so that nothing is compiled")
        if trial is not None and trial.is_needed:
            self.job.ranks.first(lambda: write_passes(plan.folder, trial))

    def _trainee(self, plan: TrainingPlan, m: int, state: State, schedule: Schedule) -> Trainee:
        job, run = self.job, plan.runs[m]
        averages = job.config.updates.averages

        def network_of(student: Student) -> Student:
            return PlainStudent(student.classifier(m)) if isinstance(student, TeachersInTraining) else student

        def trainee(student: Student, averaged: str = "", ema: Trainee | None = None) -> Trainee:
            def validate() -> dict[str, float]:
                values = job.validate(network_of(student))
                if state.step > schedule.warmup_steps and (gap := averaging_gap(values)):
                    self.screen.warn(f"{run.title}{averaged and f', {averaged}'}: {gap}")
                return values

            def ship_it(path: Path) -> None:
                ship(network_of(student), path, job.info(run, averaged))

            return Trainee(folder=run.folder, validate=validate, ship=ship_it, ema=ema)

        def ship_swa(path: Path) -> None:
            assert state.swa is not None
            student = network_of(state.swa.student)
            if job.config.sync_bn:
                synchronise_norms(student, ALONE)  # the other processes take no part
            feed = job.train_feed(run.training.batch_size, run.seed).whole()
            measure_statistics(student, feed, job.step_config(run))
            ship(student, path, job.info(run, averages["swa"]))

        ema = None if state.ema is None else trainee(state.ema.student, averages["best-ema"])
        whole = trainee(state.student, ema=ema)
        return whole if state.swa is None else replace(whole, ship_swa=ship_swa)

    def _say_notes(self, plan: TrainingPlan) -> None:
        """Say what has no kernels, and measure the layers that have."""
        job, networks = self.job, plan.networks
        for note in networks.notes:
            if note not in self._said:
                self.screen.say(f"{plan.title}: no kernels for {note}; computed by PyTorch's modules")
            self._said.add(note)
        run = plan.runs[0]
        if new := unmeasured_layers(networks, run.method, B=plan.feed.rows, image_shape=job.image_shape):
            operations, keys = new
            with self.screen.counting(f"{plan.title}: measuring layers") as counter:
                for done, key in enumerate(keys, start=1):
                    operations.choice(key, job.device)
                    counter(done, len(keys))

    def _monitor(self, title: str) -> Monitor:
        return Monitor(
            source_of(self.job.device),
            say=self._say_once,
            warn=lambda text: self.screen.warn(f"{title}: {text}"),
            interval=self.job.command.monitor_every,
        )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self.screen.say(text)
        self._said.add(text)


def _in_words(outcome: Progress, epochs: int) -> str:
    ema = "" if outcome.ema is None else f" (EMA {outcome.ema.acc:.4f} after {outcome.ema.epoch})"
    return (
        f"best val acc {outcome.best_acc:.4f} after epoch {outcome.best_epoch}/{epochs}{ema}, "
        f"{outcome.seconds:,.0f} s, {outcome.images / outcome.seconds:,.0f} images/s"
        f"{outcome.device.text() if outcome.device else ''}"
    )


def in_stages(job: Job, report: Callable[[Job], None]) -> None:
    """The stages that the command asks for, and the table of what is there: by the first process."""
    stage, trainer = job.command.stage, Trainer(job)
    if stage in ("teachers", "all"):
        trainer.teachers()
    if stage in ("distill", "all"):
        trainer.students()
    job.stop.check()
    job.ranks.first(lambda: report(job))
