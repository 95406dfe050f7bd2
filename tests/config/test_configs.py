"""Configurations: what they refuse, how they are written and read, when two runs share a folder; recipes; options."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ensdistill.config.configs import Command, Config, Training, read_config, require_same_config, write_config
from ensdistill.config.recipes import RECIPES, find_recipe
from ensdistill.fast_train import parse
from ensdistill.runtime.errors import UserError

NAMES = {
    "digits", "fashion-mnist", "cifar10-wrn28x1", "cifar100-wrn28x4", "cifar100-wrn28x10", "tiny-imagenet-resnet18",
    "imagenet-resnet50",
}  # fmt: skip


def test_the_recipes_are_there_named_and_documented():
    assert set(RECIPES) == NAMES
    for name, make in RECIPES.items():
        assert make().recipe == name and len((make.__doc__ or "").split()) > 8


def test_the_paper_s_recipe_is_the_paper_s():
    config = find_recipe("cifar100-wrn28x4")
    schedule = Training(epochs=200, warmup_epochs=5, lr=0.1, batch_size=128, weight_decay=5e-4)
    assert config.teacher == config.student == schedule
    assert (config.members, config.tau, config.alpha, config.pad, config.flip, config.factor_rate) == (
        4,
        4,
        1,
        4,
        True,
        1,
    )


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_configuration_survives_being_written(tmp_path, name):
    config = replace(find_recipe(name), methods=("hydra+ods",), train_images=7)
    write_config(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": 0}, "members: got 0, expected at least 1"),
        ({"members": 1}, r"members: latentbe\+tdiv-sdiv compares two members, got members = 1; give at least 2"),
        (
            {"members": 1, "methods": ("be",)},
            "members: be has a member for each teacher, got members = 1; give at least",
        ),
        ({"members": 1, "methods": ("kd", "latentbe")}, "members: latentbe has a member for each teacher"),
        ({"members": 1, "methods": ("hydra+ods",)}, r"members: hydra\+ods has a member for each teacher"),
        ({"ema": 1.0}, r"ema: got 1.0, expected a number between 0 and 1, such as 0.999"),
        ({"ema": 0.0}, "ema: got 0.0, expected"),
        ({"ema": float("nan")}, "ema: got nan, expected"),
        ({"swa": 0}, r"swa: got 0, expected 1 to student.epochs = 120"),
        ({"swa": 81}, r"swa: got 81, expected 1 to teacher.epochs = 80"),
        ({"members": 10**9}, "members: got 1000000000, expected at most 1,000"),
        ({"image_size": 0}, "image-size: got 0, expected 1 to 8192 pixels"),
        ({"image_size": 100_000}, "image-size: got 100000, expected 1 to 8192 pixels"),
        ({"tau": 0}, "tau: got 0, expected a positive number"),
        ({"alpha": 1.5}, "alpha: got 1.5, expected 0 to 1"),
        ({"factor_rate": -1}, "factor-rate: got -1"),
        ({"pad": -1}, "pad: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"methods": ("kd", "kd")}, "methods: got kd, kd, expected each method once"),
        ({"methods": ("kd", "kd+clean")}, r"methods: got kd, kd\+clean, expected each method once"),
        ({"methods": ("kd+",)}, r"method: 'kd\+' names no data after its \+; give 'kd', or one of clean"),
        ({"methods": ("ce+ods",)}, "'ce' cannot be shown 'ods'; it goes with clean, gaussian"),
    ],
)
def test_values_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        replace(find_recipe("digits"), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, expected at least 1"),
        ({"epochs": 10**12}, "epochs: got 1000000000000, expected at most 1,000,000"),
        ({"warmup_epochs": 9, "epochs": 9}, "warmup-epochs: got 9, expected 0 to below epochs = 9"),
        ({"lr": 0}, "lr: got 0"),
        ({"batch_size": 0}, "batch-size: got 0"),
        ({"weight_decay": -1}, "weight-decay: got -1"),
    ],
)
def test_schedules_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        Training(**change)


def test_a_method_has_one_name_and_so_one_folder():
    assert replace(find_recipe("digits"), methods=("kd+clean", "be")).methods == ("kd", "be")
    assert replace(find_recipe("digits"), members=1, methods=("kd", "ce+gaussian")).members == 1


def test_threads_are_few_for_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3})
    for threads in (-1, 0, 9, 10_000):
        with pytest.raises(UserError, match=f"threads: got {threads}, expected 1 to 8, for this process has 2 cores"):
            Command(config=find_recipe("digits"), threads=threads)
    assert Command(config=find_recipe("digits"), threads=8).threads == 8


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_monitor_looks_every_so_many_seconds(seconds):
    with pytest.raises(UserError, match=f"monitor-every: got {seconds}, expected zero or more seconds"):
        Command(config=find_recipe("digits"), monitor_every=seconds)
    assert Command(config=find_recipe("digits"), monitor_every=0).monitor_every == 0


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config.json: not a readable JSON configuration"):
        read_config(path)
    path.write_text("{half")
    with pytest.raises(UserError, match="not a readable JSON configuration"):
        read_config(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_config(path)
    values = find_recipe("digits").to_json()
    path.write_text(json.dumps(values | {"netwrk": "x"}))
    with pytest.raises(UserError, match=r"there is no field 'netwrk' \(did you mean 'network'\?\)"):
        read_config(path)
    path.write_text(json.dumps(values | {"teacher": {"epoch": 3}}))
    with pytest.raises(UserError, match=r"teacher: there is no field 'epoch' \(did you mean 'epochs'\?\)"):
        read_config(path)
    path.write_text(json.dumps(values | {"members": "four"}))
    with pytest.raises(UserError, match=r"config.json: Expected `int`, got `str` - at `\$.members`; expected"):
        read_config(path)
    path.write_text(json.dumps(values | {"precision": "fp8"}))
    with pytest.raises(UserError, match=r"config.json: Invalid enum value 'fp8' - at `\$.precision`"):
        read_config(path)
    path.write_text(json.dumps(values | {"student": {"epochs": 0}}))
    with pytest.raises(UserError, match=r"config.json: epochs: got 0, expected at least 1"):
        read_config(path)
    path.write_text("[" * 100_000)  # Python's own limit of depth
    with pytest.raises(UserError, match="not a readable JSON configuration"):
        read_config(path)
    del values["recipe"]
    with pytest.raises(UserError, match="recipe"):
        Config.from_json(values)


def test_a_folder_belongs_to_one_configuration(tmp_path):
    config = find_recipe("digits")
    require_same_config(tmp_path, config)
    write_config(tmp_path / "config.json", config)
    require_same_config(tmp_path, replace(config, tau=2.0))  # a command that ended in a mistake leaves no trace
    (tmp_path / "teachers" / "0").mkdir(parents=True)
    (tmp_path / "teachers" / "0" / "metrics.jsonl").touch()
    require_same_config(tmp_path, replace(config, methods=("be",)))
    with pytest.raises(
        UserError, match=r"holds a run of another configuration \(tau is 4.0 there, 2.0 here\); choose another --out"
    ):
        require_same_config(tmp_path, replace(config, tau=2.0))


def test_every_field_can_be_overridden():
    line = (
        "--recipe cifar100-wrn28x4 --network wrn16x2 --student.epochs 7 --teacher.lr 0.2 --no-flip "
        "--methods hydra+ods ce --seeds 3 --stage distill --resume --out runs/x"
    )
    command = parse(line.split())
    config = command.config
    assert (config.network, config.student.epochs, config.teacher.lr, config.flip) == ("wrn16x2", 7, 0.2, False)
    assert config.methods == ("hydra+ods", "ce") and config.teacher.epochs == 200
    assert (command.seeds, command.stage, command.resume, str(command.out)) == (3, "distill", True, "runs/x")
    assert parse([]).config == find_recipe("digits")


def test_another_optimizer_has_rates_of_its_own_where_none_are_given(tmp_path):
    def rates(line):
        config = parse(line.split()).config
        return [(one.lr, one.weight_decay) for one in (config.teacher, config.student)]

    assert rates("--optimizer sgd") == [(0.1, 5e-4)] * 2
    assert rates("--optimizer adamw") == [(1e-3, 1e-2)] * 2
    assert rates("--recipe fashion-mnist --optimizer adamw") == [(1e-3, 1e-2)] * 2
    assert rates("--optimizer adamw --student.lr 0.1 --teacher.weight_decay=0") == [(1e-3, 0), (0.1, 1e-2)]
    path = tmp_path / "config.json"
    write_config(path, parse(["--optimizer", "adamw", "--student.lr", "0.002"]).config)
    assert rates(f"--recipe {path}") == rates(f"--recipe {path} --optimizer adamw") == [(1e-3, 1e-2), (0.002, 1e-2)]
    assert rates(f"--recipe {path} --optimizer sgd") == [(0.1, 5e-4)] * 2


def test_a_folder_of_a_version_that_knew_sgd_alone_is_gone_on_with(tmp_path):
    config = find_recipe("digits")
    values = config.to_json()
    for name in ("optimizer", "ema", "swa"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "teachers" / "0").mkdir(parents=True)
    (tmp_path / "teachers" / "0" / "metrics.jsonl").touch()
    require_same_config(tmp_path, config)
    for name, value in {"optimizer": "adamw", "ema": 0.9, "swa": 1}.items():
        with pytest.raises(UserError, match=rf"another configuration \({name} is (sgd|None) there, {value} here\)"):
            require_same_config(tmp_path, replace(config, **{name: value}))


def test_epochs_of_teachers_that_are_not_trained_do_not_matter(tmp_path):
    config = find_recipe("digits")
    assert replace(config, swa=config.student.epochs, teachers=(tmp_path,)).swa == 120


def test_the_configuration_of_an_earlier_run_is_a_recipe(tmp_path):
    path = tmp_path / "config.json"
    write_config(path, replace(find_recipe("digits"), tau=2.5, teachers=(tmp_path / "a", tmp_path / "b")))
    config = parse(["--recipe", str(path), "--members", "3"]).config
    assert config == replace(read_config(path), members=3) and config.recipe == "digits"


@pytest.mark.parametrize("more", ["", "--plan", "--resume", "--network-args={}", "--teacher-builder other:function"])
@pytest.mark.parametrize(("field", "option"), [("network", "--network"), ("teacher_builder", "--teacher-builder")])
def test_a_builder_that_a_file_names_is_named_on_the_command_line_too(tmp_path, field, option, more):
    path = tmp_path / "config.json"
    values = {field: "subprocess:check_call", f"{field.removesuffix('_builder')}_args": '{"args": "id"}'}
    write_config(path, replace(find_recipe("digits"), **values))
    if more.split()[:1] != [option]:
        message = f"names the builder subprocess:check_call.*; give {option} subprocess:check_call as well if you trust"
        with pytest.raises(UserError, match=message):
            parse(["--recipe", str(path), *more.split()])
    for named in ([option, "subprocess:check_call"], [f"{option.replace('r-b', 'r_b')}=subprocess:check_call"]):
        assert getattr(parse(["--recipe", str(path), *named]).config, field) == "subprocess:check_call"
    other = parse(["--recipe", str(path), option, "theirs:build"]).config
    assert getattr(other, field) == "theirs:build"


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/x", "", ".", "a\nb"])
def test_a_file_s_recipe_is_a_name_and_no_place(name):
    with pytest.raises(UserError, match=r"config.json: recipe: got .*, expected a name of letters"):
        Config.from_json(find_recipe("digits").to_json() | {"recipe": name})


@pytest.mark.parametrize("path", ["", "  ", 5, ["a"], {"a": 1}])
def test_a_file_s_paths_are_texts(path):
    with pytest.raises(UserError, match=r"config.json: expected the text of a path, got .* at `\$.data`"):
        Config.from_json(find_recipe("digits").to_json() | {"data": path})
    with pytest.raises(UserError, match=r"config.json: expected the text of a path"):
        Config.from_json(find_recipe("digits").to_json() | {"teachers": [path]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe nowhere/config.json", "nowhere/config.json: not a readable JSON configuration"),
        ("--recipe digts", r"--recipe digts: no such recipe \(did you mean 'digits'\?\); expected one of digits"),
        ("--recipe", "--recipe: no name given"),
        ("--recipe=cifar", "--recipe cifar: no such recipe"),
        ("--netwrk wrn10x1", r"^Unrecognized options: --netwrk, wrn10x1 \(did you mean '--network'\?\); --help lists"),
        ("--student.epoch 3", r"--student.epoch, 3 \(did you mean '--student.epochs'\?\)"),
        ("--tau four", "^--tau: could not convert string to float: 'four'; --help"),
        ("--stage al", r"^invalid choice 'al' for argument '--stage'. Expected one of \('teachers', 'distill'"),
        ("--methods latentb", r"no student is called 'latentb' \(did you mean 'latentbe'\?\)"),
        ("--members 1", "compares two members"),
        ("--seeds 0", "seeds: got 0"),
        ("--threads 10000000", "threads: got 10000000, expected 1 to"),
        ("--methods kd+", r"'kd\+' names no data after its \+"),
        ("--student.epochs 0", "^student: epochs: got 0, expected at least 1; --help"),
        ("--data /nowhere/at/all", "/nowhere/at/all: no such file or folder"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments.split())


@pytest.mark.parametrize(
    "arguments", [["--out", ""], ["--out="], ["--data", " "], ["--data="], ["--teachers", "a", ""]]
)
def test_empty_values_are_refused(arguments):
    option = arguments[0].rstrip("=")
    with pytest.raises(UserError, match=f"^{option}: got an empty text, expected a value; give one, or leave"):
        parse(arguments)


def test_help_needs_no_docstrings(monkeypatch, capsys):
    for make in RECIPES.values():
        monkeypatch.setattr(make, "__doc__", None)
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0 and all(name in capsys.readouterr().out for name in ["cifar10-wrn28x1"])
    assert parse([]).config == find_recipe("digits")


def test_help_lists_the_recipes_and_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(name in text for name in NAMES) and "--student.epochs" in text and "--recalibrate-bn" in text
