import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

import kit
from kit.core.store import write_json
from kit.lab import batches, parameters, runs
from kit.lab.batches import main, run_batch
from kit.lab.parameters import profile_overrides
from kit.lab.runs import Run, plan

PARAMETERS = """\
steps = 2       # optimizer steps
lr = 0.1        # step size
name = "small"  # small or large
flag = False
limit = None    # bytes
widths = (8, 8)
seed = 0
out = "runs/tiny"
"""
BODY = """\
import json, pathlib, time
folder = pathlib.Path(out)
(folder / "started").touch()
if name == "hang":
    time.sleep(600)
if name == "broken":
    raise RuntimeError("the loss is not finite")
record = {"notebook": "tiny", "parameters": {"steps": steps, "lr": lr}, "seed": seed,
          "bytes": 100 // steps, "ratio": steps, "perplexity": 10.0 + steps}
(folder / "result.json").write_text(json.dumps(record))
"""


RECORD = {"notebook": "tiny", "parameters": {}, "seed": 0, "bytes": 5, "perplexity": 2.0}


def write_notebook(path, body=BODY, parameters=PARAMETERS):
    cells = [
        nbformat.v4.new_markdown_cell("# Tiny", id="title"),
        nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body, id="body"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    monkeypatch.delenv("KIT_PROFILE", raising=False)


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "tiny.ipynb")


@pytest.fixture
def script(monkeypatch):
    """Runs the given Python code in place of papermill; its sys.argv[1] is the run's folder."""

    def replace(code):
        monkeypatch.setattr(
            Run, "command", lambda run: [sys.executable, "-S", "-c", code, str(run.folder)]
        )

    return replace


def test_a_grid_is_every_combination_with_every_seed(notebook, tmp_path):
    runs = plan(
        notebook, {"steps": [1, 3], "lr": [0.1, 0.2]}, seeds=[0, 1], folder=tmp_path / "runs"
    )
    defaults = {"lr": 0.1, "seed": 0}
    found = {
        tuple({**defaults, **run.parameters}[name] for name in ("steps", "lr", "seed"))
        for run in runs
    }
    assert found == set(itertools.product([1, 3], [0.1, 0.2], [0, 1]))
    assert len({run.folder for run in runs}) == 8
    assert [run.parameters for run in plan(notebook, [{"steps": 1}, {"lr": 1}])] == [
        {"steps": 1},
        {"lr": 1},
    ]


def test_the_folder_follows_code_parameters_and_version_only(notebook, tmp_path, monkeypatch):
    def folder(path=notebook, steps=3):
        return plan(path, {"steps": [steps]})[0].folder

    first = folder()
    assert first.name.startswith("tiny-steps=3-") and first.parent == Path("runs").resolve()
    content = nbformat.read(notebook, 4)
    content.cells[0].source = "# Other words"
    content.cells[2].outputs = [nbformat.v4.new_output("stream", text="executed")]
    nbformat.write(content, notebook)
    assert folder() == first
    assert folder(steps=4) != first
    assert folder(write_notebook(notebook, BODY + "pass")) != first
    write_notebook(notebook)
    monkeypatch.setattr(kit, "__version__", "9")
    assert folder() != first


def test_what_equals_the_default_is_the_same_run(notebook):
    runs = plan(notebook, [{"steps": 2}, {"lr": 0.1}, {}])
    assert len(runs) == 1 and runs[0].parameters == {}


@pytest.mark.parametrize(
    "grid, says",
    [
        ({"step": [1]}, r"no parameter 'step'; did you mean 'steps'\?"),
        ({"zzz": [1]}, "no parameter 'zzz'; it has steps, lr"),
        ({"lr": ["1e-3"]}, "lr is .1e-3.; it must be .*write 1.0e-3"),
        ({"steps": [1.5]}, "steps is 1.5; it must be a whole number from 1"),
        ({"steps": [True]}, "steps is True; it must be a whole number"),
        ({"flag": [1]}, "flag is 1; it must be True or False"),
        ({"name": [3]}, "name is 3; it must be a text"),
        ({"widths": [8]}, "widths is 8; it must be a tuple"),
        ({"steps": [-1]}, "steps is -1; it must be"),
        ({"lr": [float("nan")]}, "lr is nan; it must be a number above 0"),
        ({"out": ["x"]}, "sets 'out' itself"),
        ({"steps": 3}, "grid is .*; it must be a dict of which each is a list"),
        ({"steps": []}, "grid is .*; it must be a dict of which each is a list"),
        ([3], "or a list of which each is a dict"),
        ([], "or a list of which each is a dict"),
    ],
)
def test_bad_grids_are_one_sentence(notebook, grid, says):
    with pytest.raises(ValueError, match=says) as error:
        plan(notebook, grid)
    assert "\n" not in str(error.value)


def test_values_of_compatible_type_pass(notebook):
    assert plan(notebook, {"lr": [1], "limit": [3], "widths": [[4, 4]], "flag": [True]})


def test_notebooks_that_a_batch_cannot_drive_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebook"):
        plan(tmp_path / "none.ipynb", {})
    with pytest.raises(ValueError, match="no parameter 'out'"):
        plan(write_notebook(tmp_path / "a.ipynb", parameters="steps = 1\n"), {"steps": [1]})
    (tmp_path / "c.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="c.ipynb"):
        plan(tmp_path / "c.ipynb", {})


def test_parameters_are_read_whatever_their_comments_and_values(tmp_path):
    cell = "out = ''\ntied = True  # head = embedding\nlow = -1.5\nfree = 2 * 3\n"
    notebook = write_notebook(tmp_path / "b.ipynb", parameters=cell)
    [run] = plan(notebook, [{"tied": False, "low": 2, "free": "anything"}])
    assert run.parameters == {"tied": False, "low": 2, "free": "anything"}
    with pytest.raises(ValueError, match="tied is 1; it must be True or False"):
        plan(notebook, {"tied": [1]})


def test_more_jobs_than_cores_are_refused(notebook):
    with pytest.raises(ValueError, match="jobs is 9999; it must be a whole number from 1 to"):
        run_batch(notebook, {"steps": [1]}, jobs=9999)


def test_profiles_hold_shared_names_and_apply_to_those_that_exist(notebook, monkeypatch):
    assert profile_overrides({"steps": 1}) == {}
    profiles = {
        path.stem: yaml.safe_load(path.read_text()) for path in parameters.PROFILES.glob("*.yaml")
    }
    assert set(profiles) == {"smoke", "quick", "reference"}
    assert len({frozenset(profile) for profile in profiles.values()}) == 1
    monkeypatch.setenv("KIT_PROFILE", "smoke")
    smoke = profiles["smoke"]
    assert profile_overrides({"steps": 1, "mine": 2}) == {"steps": smoke["steps"]}
    assert profile_overrides({"out": "runs/mine"}) == {"out": "runs-smoke/mine"}
    assert profile_overrides({"out": "/tmp/mine"}) == {}
    assert [run.parameters["steps"] for run in plan(notebook, [{}, {"steps": 5}])] == [
        smoke["steps"],
        5,
    ]
    monkeypatch.setenv("KIT_PROFILE", "smok")
    with pytest.raises(ValueError, match="'smok', expected one of quick, reference, smoke"):
        profile_overrides({})


def test_a_batch_through_papermill(notebook, tmp_path, capsys):
    runs = [{"steps": 4}, {"name": "broken"}]
    frame, failed = run_batch(
        notebook, runs, jobs=min(2, batches.cores()), folder=tmp_path / "runs"
    )
    assert list(frame["parameters.steps"]) == [4]
    [(failed, lines)] = failed.items()
    assert failed.startswith("tiny-name=broken") and "the loss is not finite" in lines
    done = Path(frame["run"][0])
    assert (done / "tiny.ipynb").exists()
    assert yaml.safe_load((done / "parameters.yaml").read_text()) == {"steps": 4, "out": str(done)}
    assert re.search(r"\[[12]/2\] failed", capsys.readouterr().out)


def test_success_is_exit_code_and_record(notebook, tmp_path, script):
    script(
        "import os, sys; steps = os.path.basename(sys.argv[1]).split('steps=')[1][0]\n"
        "result = sys.argv[1] + '/result.json'\n"
        f"if steps != '1': open(result, 'w').write('{json.dumps(RECORD)}')\n"
        "sys.exit(steps == '3')"
    )
    frame, failed = run_batch(notebook, {"steps": [1, 3, 5]}, folder=tmp_path)
    assert len(frame) == 1 and "steps=5" in frame["run"][0]
    assert sorted(name.split("-")[1] for name in failed) == ["steps=1", "steps=3"]


def test_finished_are_skipped_failed_wait_for_retry_killed_continue(notebook, tmp_path, script):
    script(
        "import sys; open(sys.argv[1] + '/tries', 'a').write('.')\n"
        "if 'broken' in sys.argv[1]: sys.exit(1)\n"
        f"open(sys.argv[1] + '/result.json', 'w').write('{json.dumps(RECORD)}')"
    )
    call = dict(notebook=notebook, grid={"name": ["small", "broken"]}, folder=tmp_path)
    good, bad = (run.folder for run in plan(**call))

    def tries():
        return len((good / "tries").read_text()), len((bad / "tries").read_text())

    run_batch(**call)
    assert tries() == (1, 1)
    assert len(run_batch(**call)[1]) == 1 and tries() == (1, 1)
    run_batch(**call, retry=True)
    assert tries() == (1, 2)
    write_json(good / "status.json", {"exit_code": -9, "seconds": 1.0})  # killed: cut short
    run_batch(**call)
    assert tries() == (2, 2)
    (good / "status.json").unlink()  # its batch was killed
    run_batch(**call)
    assert tries() == (3, 2)
    (good / "status.json").write_text('{"exit_code": "0"')
    with pytest.raises(ValueError, match="status.json is damaged: delete it"):
        run_batch(**call)


def test_a_run_of_another_living_batch_is_left_alone(notebook, tmp_path, script, capsys):
    script("raise SystemExit('must not start')")
    run = plan(notebook, [{}], folder=tmp_path)[0]
    run.folder.mkdir()
    with run.claim():
        frame, failed = run_batch(notebook, [{}], folder=tmp_path)
    assert not len(frame) and not failed and not (run.folder / "log.txt").exists()
    assert run.state() == "new"
    assert "1 runs, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, tries", [("zmq.error.ZMQError: Address already in use", 2), ("NaN", 1)]
)
def test_a_kernel_that_did_not_start_is_started_once_more(notebook, tmp_path, script, text, tries):
    script(f"import sys; open(sys.argv[1] + '/tries', 'a').write('.'); sys.exit({text!r})")
    _, failed = run_batch(notebook, [{}], folder=tmp_path)
    [folder] = [tmp_path / name for name in failed]
    assert len((folder / "tries").read_text()) == tries


def test_threads_are_shared_out_and_jobs_bounded(notebook, tmp_path, script, monkeypatch):
    monkeypatch.setattr(batches, "cores", lambda: 6)
    monkeypatch.setenv("KIT_PROFILE", "smoke")
    script(
        "import os, sys, json\nwhere = os.path.dirname(sys.argv[1])\n"
        "open(sys.argv[1] + '/running', 'w').close()\n"
        "others = sum(os.path.exists(f'{where}/{n}/running') for n in os.listdir(where))\n"
        f"record = {RECORD} | {{'threads': os.environ['OMP_NUM_THREADS'],\n"
        "          'profile': 'KIT_PROFILE' in os.environ, 'at once': others}\n"
        "json.dump(record, open(sys.argv[1] + '/result.json', 'w'))\n"
        "os.remove(sys.argv[1] + '/running')"
    )
    frame, _ = run_batch(notebook, {"steps": [1, 2, 3, 4, 5]}, jobs=3, folder=tmp_path)
    assert len(frame) == 5 and set(frame["threads"]) == {"2"} and not frame["profile"].any()
    assert frame["at once"].max() <= 3


def test_the_status_says_how_far_runs_are_and_starts_nothing(notebook, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("grid: {steps: [1, 3]}\nseeds: [0, 1]\n")
    folder = tmp_path / "runs"
    command = [str(notebook), str(tmp_path / "grid.yaml"), "--status", "--folder", str(folder)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("new      tiny-steps=") for line in lines) == 4
    assert not folder.exists()
    runs = plan(notebook, {"steps": [1, 3]}, seeds=[0, 1], folder=folder)
    for run, code in zip(runs, (0, 1, -9)):
        write_json(run.folder / "status.json", {"exit_code": code, "seconds": 1.0})
        (run.folder / "log.txt").write_text("first\nlast\n")
        (run.folder / "result.json").write_text("{}")
    runs[3].folder.mkdir()
    with runs[3].claim():
        assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["finished", "failed", "new", "running"]
    assert lines[1].endswith("  last")


def test_the_command_line_reports_and_exits_with_the_outcome(notebook, tmp_path, script, capsys):
    script(
        "import sys; steps = sys.argv[1].split('steps=')[1][0]\n"
        "if steps == '3': sys.exit('out of luck')\n"
        f"open(sys.argv[1] + '/result.json', 'w').write('{json.dumps(RECORD)}')"
    )
    (tmp_path / "grid.yaml").write_text("grid: {steps: [1, 3]}\n")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert (
            main([str(notebook), str(tmp_path / "grid.yaml"), "--folder", str(tmp_path / "runs")])
            == 1
        )
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)
    out = capsys.readouterr().out
    assert "out of luck" in out and "--retry" in out
    assert "perplexity" in out and "steps=1" in out.split("Failed:")[0]


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "no grid file"),
        ("grid: [", "not valid YAML"),
        ("steps: [1]", "expected the key grid"),
        ("grid: {step: [1]}", "did you mean 'steps'"),
        ("grid: {steps: [1]}\nseeds: 3", "seeds is 3; it must be a list"),
    ],
)
def test_bad_grid_files_end_with_one_sentence(notebook, tmp_path, capsys, text, says):
    if text:
        (tmp_path / "grid.yaml").write_text(text)
    assert main([str(notebook), str(tmp_path / "grid.yaml"), "--status"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP", "SIGKILL"])
def test_whatever_ends_a_batch_ends_its_kernels_and_the_run_can_continue(
    notebook, tmp_path, number
):
    grid, folder = tmp_path / "grid.yaml", tmp_path / "runs"
    grid.write_text("grid: {name: [hang]}\n")
    arguments = [str(notebook), str(grid), "--folder", str(folder)]
    command = [sys.executable, "-m", "kit.lab.batches", *arguments]
    files = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    batch = psutil.Popen(command, cwd=runs.ROOT, **files)
    [run] = plan(notebook, {"name": ["hang"]}, folder=folder)
    deadline = time.monotonic() + 120
    while not (run.folder / "started").exists() and time.monotonic() < deadline:
        assert batch.is_running()
        time.sleep(0.05)
    assert run.state() == "running"
    family = batch.children(recursive=True)
    batch.send_signal(getattr(signal, number))
    assert batch.wait(60) == (-9 if number == "SIGKILL" else 130) and len(family) >= 2
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert run.state() == "new"


def test_a_killed_papermill_is_cut_short_and_its_kernel_ends(notebook, tmp_path, script):
    script("import os; os.kill(os.getpid(), 9)")
    [run] = plan(notebook, {"steps": [3]}, folder=tmp_path)
    orphan = {**os.environ, runs.MARK: str(run.folder)}
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=orphan)
    _, failed = run_batch(notebook, {"steps": [3]}, folder=tmp_path)
    assert not failed and run.state() == "new" and orphan.wait(20) == -9


def test_what_another_batch_runs_or_ran_is_left_alone(notebook, tmp_path, script):
    script("raise SystemExit('must not start')")
    [run] = plan(notebook, {"steps": [3]}, folder=tmp_path)
    attend = run, Run.execute, ("new",), threading.Event()
    run.folder.mkdir()
    with run.claim():
        assert batches._attend(*attend).startswith("still being run by another batch")
    write_json(run.folder / "status.json", {"exit_code": 0, "seconds": 1.0})
    write_json(run.folder / "result.json", {})
    assert batches._attend(*attend).startswith("finished by another batch")


def test_odd_texts_and_folders_come_through_whole(notebook, tmp_path, script):
    script(f"import sys, json; json.dump({RECORD}, open(sys.argv[1] + '/result.json', 'w'))")
    odd = ["a'b\"c", "línea\nzwei", "C:\\new", "{curly} $HOME `x`", "", "yes", "null", "1e-3"]
    odd += ["- x: y", "日本語", "a" * 300, "../../evil", "#comment = 1", "\t"]
    folder = tmp_path / "wörk 'quoted'"
    _, failed = run_batch(notebook, {"name": odd}, folder=folder)
    places = [run.folder for run in plan(notebook, {"name": odd}, folder=folder)]
    given = [yaml.safe_load((place / "parameters.yaml").read_text()) for place in places]
    assert not failed and [one["name"] for one in given] == odd
    assert len({*places}) == len(odd) and {place.parent for place in places} == {folder}


def test_rows_show_what_was_swept_and_grids_have_files_of_their_own(notebook, tmp_path, script):
    script(f"import sys, json; json.dump({RECORD}, open(sys.argv[1] + '/result.json', 'w'))")
    frame, _ = run_batch(notebook, {"steps": [2, 3], "lr": [0.5]}, folder=tmp_path)
    assert list(frame.columns[:3]) == ["run", "steps", "lr"] and list(frame["steps"]) == [2, 3]
    run_batch(notebook, {"steps": [2]}, folder=tmp_path)
    assert len(list(tmp_path.glob("tiny-*.csv"))) == 2


@pytest.mark.parametrize("scheduler", ["local", "tcp://127.0.0.1:1"])
def test_a_batch_on_dask(notebook, tmp_path, scheduler, capsys, monkeypatch):
    call = {"folder": tmp_path / "runs", "scheduler": scheduler}
    if scheduler != "local":
        import distributed

        client = distributed.Client
        monkeypatch.setattr(
            distributed, "Client", lambda address, timeout: client(address, timeout=1)
        )
        with pytest.raises(ValueError, match="No Dask workers answer at 'tcp://127.0.0.1:1'"):
            run_batch(notebook, {"steps": [3]}, **call)
        return
    frame, failed = run_batch(notebook, {"steps": [3]}, **call)
    [run] = plan(notebook, {"steps": [3]}, folder=tmp_path / "runs")
    assert not failed and list(frame["steps"]) == [3] and run.state() == "finished"
    assert (run.folder / "tiny.ipynb").exists() and (run.folder / "started").exists()
    assert "dashboard http://127.0.0.1:" in capsys.readouterr().out
    assert list(run_batch(notebook, {"steps": [3]}, **call)[0]["steps"]) == [3]


def test_a_batch_whose_workers_are_gone_says_so_and_goes_on_with_another(
    notebook, tmp_path, capsys, monkeypatch
):
    import distributed

    monkeypatch.setattr(batches, "LOOK", 0.01)
    options = {
        "processes": False,
        "n_workers": 1,
        "threads_per_worker": 1,
        "dashboard_address": None,
    }
    with distributed.LocalCluster(**options, protocol="tcp://", host="127.0.0.1") as cluster:
        place = {"folder": tmp_path / "runs", "scheduler": cluster.scheduler_address}

        def said(*args, **kwargs):
            print(*args, **kwargs)
            if "at a time" in args[0]:  # the batch has begun, and its only worker goes
                cluster.scale(0)
                while cluster.scheduler_info["workers"]:
                    time.sleep(0.01)
            if "No Dask worker is left" in args[0]:
                cluster.scale(1)

        monkeypatch.setattr(batches, "print", said, raising=False)
        frame, failed = run_batch(notebook, {"steps": [3]}, **place)
    assert not failed and list(frame["steps"]) == [3]
    assert capsys.readouterr().out.count("No Dask worker is left: waiting for another") == 1
