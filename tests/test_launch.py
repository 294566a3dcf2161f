"""The scripts in launch/, with stand-ins for the commands of clouds and clusters on PATH."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from processes import ONE_DEVICE

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TRAIN = ("configs/tiny/base64.py", "--workdir", "runs/x", "--stage.name", "a name & more")


def stand_in(folder: Path, name: str, body: str) -> None:
    """An executable `name` on the PATH of `environment(folder)`, that notes its arguments."""
    (folder / "bin").mkdir(exist_ok=True)
    file = folder / "bin" / name
    note = f'printf "%s\\n" "{name} $*" >> {folder}/calls'
    file.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
    file.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", **more}


def calls(folder: Path) -> list[str]:
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def launch(folder: Path, script: str, *args: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env=environment(folder, **more),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_shell_passes_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = beside if beside.exists() else "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS, LAUNCH / "completion.bash"],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# Dry runs


@pytest.mark.parametrize(
    "script,options,expected",
    [
        ("single_node.sh", [], ["cascade train {train}"]),
        (
            "slurm.sh",
            ["--nodes", "2", "--gpus", "4", "--sbatch", "--partition=gpu"],
            [
                r"sbatch .*--nodes=2 --ntasks-per-node=4 --gpus-per-node=4 .*--requeue.* "
                r"--partition=gpu \S*/slurm.sbatch {train}",
                r"in the job: .*srun.*single_node.sh.*",
                r"in the job: .*scontrol.*requeue.*",
            ],
        ),
        (
            "tpu.sh",
            ["--spot", "--zone", "z", "--project", "p", "--bucket", "b", "up"],
            [
                r"gcloud compute tpus queued-resources create cascade .*--spot .*--project=p",
                r"gcloud .* describe cascade .*",
                r"mkdir -p .*",
                r"git .*archive .*HEAD",
                r"gcloud .* scp .*--worker=all .*",
                r"gcloud .* ssh cascade --worker=all .*pip install .*",
                r"gcloud .* ssh cascade --worker=all .*gcsfuse --implicit-dirs b cascade/bucket.*",
                r"gcloud .* ssh cascade --worker=all .*single_node.sh configs/tiny/base64.py .*",
                r"gcloud .* ssh cascade --worker=0 .*systemctl is-active cascade.*",
                r"gcloud .* delete cascade --force .*--zone=z.*",
            ],
        ),
    ],
)
def test_a_dry_run_prints_every_command_and_runs_none(script, options, expected, tmp_path):
    for name in ("cascade", "sbatch", "srun", "scontrol", "gcloud", "git", "kubectl", "docker"):
        stand_in(tmp_path, name, "")
    done = launch(tmp_path, script, "--dry-run", *options, *TRAIN)
    assert done.returncode == 0, done.stderr
    train = re.escape("configs/tiny/base64.py --workdir runs/x --stage.name 'a name & more'")
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern.replace("{train}", train), line)
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    "action,pattern",
    [
        ("build", r"docker build .*--tag i .*\ndocker push i"),
        ("wait", r"kubectl wait --for=condition=Completed .*jobset/cascade"),
        ("logs", r"kubectl logs --follow .*jobset-name=cascade,.*"),
        ("status", r"kubectl get jobset,pods .*"),
        ("delete", r"kubectl delete jobset cascade"),
    ],
)
def test_every_action_on_kubernetes_has_its_command(action, pattern, tmp_path):
    done = launch(tmp_path, "gke.sh", "--dry-run", "--image", "i", action)
    assert re.fullmatch(pattern, done.stdout.strip())


@pytest.mark.parametrize("script", ["single_node.sh", "slurm.sh", "tpu.sh", "gke.sh"])
@pytest.mark.parametrize(
    "words,message",
    [
        (["configs/tiny/base64.py"], "--workdir DIR is missing"),
        (["--retries"], "--retries needs a value"),
        (["--nonsense"], "unknown option --nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, words, message, tmp_path):
    action = {"tpu.sh": ["run"], "gke.sh": ["apply"]}.get(script, [])
    words = words if words[0].startswith("--") else [*action, *words]
    done = launch(tmp_path, script, "--dry-run", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


# Kubernetes


def manifest(folder: Path, *options: str) -> dict:
    """What gke.sh hands to kubectl."""
    stand_in(folder, "kubectl", f"cat > {folder}/manifest.yaml")
    options = ("--image", "registry/cascade", "--bucket", "mine", *options)
    done = launch(folder, "gke.sh", *options, "apply", *TRAIN)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((folder / "manifest.yaml").read_text())


# The fields of JobSet v1alpha2, Job v1 and Pod v1 that a manifest of ours may use, with their
# types; a field that is not here, or of another type, would be refused or ignored by the server.
MAP = dict[str, str]
SCHEMA = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": MAP},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "template": {
                            "metadata": {"annotations": MAP},
                            "spec": {
                                "restartPolicy": str,
                                "serviceAccountName": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": MAP,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "command": [str],
                                        "args": [str],
                                        "ports": [{"containerPort": int}],
                                        "resources": {"limits": {"google.com/tpu": int}},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": str,
                                        "csi": {"driver": str, "volumeAttributes": MAP},
                                    }
                                ],
                            },
                        },
                    }
                },
            }
        ],
    },
}


def check(value, schema, where="manifest"):
    if schema is MAP:
        assert all(type(k) is str and type(v) is str for k, v in value.items()), where
    elif isinstance(schema, dict):
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    else:
        assert type(value) is schema, f"{where}: {value!r}"


def test_the_jobset_has_the_fields_and_types_of_its_schema(tmp_path):
    found = manifest(tmp_path)
    check(found, SCHEMA)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_the_jobset_has_a_pod_for_every_host_and_passes_the_training_words_on(tmp_path):
    found = manifest(tmp_path, "--topology", "4x4x8", "--slices", "3", "--retries", "5")
    (jobs,) = found["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (3, 32, 32)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == list(TRAIN)
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    # What a container does must be there in the image, which is this checkout.
    assert (LAUNCH.parent / container["command"][1]).exists()


# Single node, for real


def test_a_crashed_run_starts_again_and_its_success_ends_it(tmp_path):
    stand_in(tmp_path, "cascade", f"[ $(wc -l < {tmp_path}/calls) -ge 3 ] || exit 7")
    done = launch(tmp_path, "single_node.sh", "--wait", "0", *TRAIN)
    assert done.returncode == 0
    assert calls(tmp_path) == ["cascade train " + " ".join(TRAIN)] * 3


@pytest.mark.parametrize("status,tries", [(7, 3), (2, 1)])
def test_retries_end_and_mistakes_are_not_repeated(status, tries, tmp_path):
    stand_in(tmp_path, "cascade", f"exit {status}")
    done = launch(tmp_path, "single_node.sh", "--retries", "2", "--wait", "0", *TRAIN)
    assert (done.returncode, len(calls(tmp_path))) == (status, tries)


def saving(folder: Path) -> str:
    """A cascade that takes a moment to save at the first SIGTERM, and whom a second one kills."""
    return f"""
        trap 'trap - TERM; sleep 0.2; touch {folder}/saved$SLURM_PROCID; exit 143' TERM
        touch {folder}/started$SLURM_PROCID
        while true; do sleep 0.05; done"""


def test_sigterm_reaches_cascade_which_saves_before_the_script_ends(tmp_path):
    stand_in(tmp_path, "cascade", saving(tmp_path))
    process = subprocess.Popen(
        ["bash", LAUNCH / "single_node.sh", *TRAIN], env=environment(tmp_path), cwd=tmp_path
    )
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (tmp_path / "saved").exists()
    assert len(calls(tmp_path)) == 1


def wait_for(file: Path) -> None:
    for _ in range(1200):
        if file.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(file)


CONFIG = """
from cascade import testing
from cascade.scenes.dataset import ScenesData
from cascade.training.stage_training import StageTraining

def config():
    return StageTraining(stage=testing.smallest_stage(128), data=ScenesData(split="train"),
                         images=16, batch_size=8, preview_every_images=0)
"""


# Where it is read, the process has been told to stop after its first step.
STOPS = """
import os, signal
from cascade.training.log import TrainingLog

add = TrainingLog.add

def add_and_stop(*given):
    add(*given)
    os.kill(os.getpid(), signal.SIGTERM)

TrainingLog.add = add_and_stop
"""


def test_a_real_training_ends_complete_after_a_killed_and_a_stopped_process(tmp_path):
    """The stopped one was told by other means than the script, such as a signal to another host."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "stops.py").write_text(STOPS + CONFIG)
    real = f"{sys.executable} -m cascade"
    stand_in(
        tmp_path,
        "cascade",
        f"""case $(wc -l < {tmp_path}/calls) in
            1) {real} --version; kill -KILL $$ ;;
            2) exec {real} train stops.py "${{@:3}}" ;;
            *) exec {real} "$@" ;;
        esac""",
    )
    done = launch(
        tmp_path,
        "single_node.sh",
        *("--wait", "0", "config.py", "--workdir", "run"),
        PYTHONPATH=str(LAUNCH.parent),
        XLA_FLAGS=ONE_DEVICE,
    )
    assert done.returncode == 0, done.stderr
    assert "status 137" in done.stderr and len(calls(tmp_path)) == 3
    assert "stopped: run; the same command goes on" in done.stderr and "status 143" in done.stderr
    assert done.stderr.count("done: run") == 1
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [16]  # as if it had never been stopped


# The cascade that ships

RECIPE = """
case "$1" in
    train) [ -e "$2" ] || exit 3
        prev=
        for word in "$@"; do
            if [ "$prev" = --init ] && [ ! -e "$word" ]; then exit 4; fi
            if [ "$prev" = --workdir ]; then mkdir -p "$word"; fi
            prev=$word
        done ;;
    export) folders=()
        for word in "${@:2}"; do
            case "$word" in */*) folders+=("$word") ;; esac
        done
        for run in "${folders[@]::${#folders[@]}-1}"; do [ -e "$run" ] || exit 5; done
        mkdir "${folders[-1]}" ;;
    eval) mkdir "${@: -1}" ;;
esac"""


def test_the_recipe_begins_each_part_with_what_an_earlier_one_made_and_repeats_no_export(tmp_path):
    stand_in(tmp_path, "cascade", RECIPE)
    first = launch(tmp_path, "train_scenes.sh", str(tmp_path / "runs"))
    assert first.returncode == 0, first.stderr
    made = calls(tmp_path)
    configs = [word for call in made for word in call.split() if word.endswith(".py")]
    recipe = {f"configs/scenes/{file.name}" for file in (LAUNCH / "../configs/scenes").glob("*.py")}
    assert len(configs) == len(recipe) and set(configs) == recipe
    # A stage that another config begins is not begun from nothing.
    trained = [call.split() for call in made if call.startswith("cascade train ")]
    started = [call[2] for call in trained if "--init" not in call]
    assert started == [
        f"configs/scenes/{name}.py"
        for name in ("text_encoder", "base64_closeup", "sr256_pairs", "sr1024")
    ]
    again = launch(tmp_path, "train_scenes.sh", str(tmp_path / "runs"))
    assert again.returncode == 0, again.stderr
    repeated = calls(tmp_path)[len(made) :]
    assert {call.split()[1] for call in repeated} == {"train", "sample"}


def test_the_recipe_ends_with_a_part_that_was_stopped_and_exports_none_of_it(tmp_path):
    """Ctrl-C reaches script and part alike; the part saves, and exits with a status of its own."""
    part = """
        [[ $2 != *closeup* ]] && exit
        trap 'trap - INT; touch saved; exit 143' INT
        touch started
        while true; do sleep 0.05; done"""
    stand_in(tmp_path, "cascade", f"cd {tmp_path}; {part}")
    # As in a terminal, also where the tests themselves are in the background and ignore Ctrl-C.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execvp('bash', ['bash', *sys.argv[1:]])"
    )
    script = [LAUNCH / "train_scenes.sh", tmp_path / "runs"]
    process = subprocess.Popen(
        [sys.executable, "-c", heeding, *script],
        env=environment(tmp_path),
        start_new_session=True,
    )
    try:
        wait_for(tmp_path / "started")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 143
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "saved").exists()
    assert [call.split()[1] for call in calls(tmp_path)] == ["train", "train"]


# SLURM, with local processes for its nodes


def slurm(folder: Path, cascade: str) -> None:
    """sbatch that runs the job at once; srun whose tasks are processes, all of which it signals."""
    stand_in(folder, "cascade", cascade)
    stand_in(
        folder,
        "sbatch",
        """
        for word in "$@"; do
            case "$word" in
                --nodes=*) nodes=${word#*=} ;;
                --ntasks-per-node=*) tasks=${word#*=} ;;
                *.sbatch) break ;;
            esac
            shift
        done
        cp "$1" spooled; shift
        echo $$ > job_pid
        SLURM_JOB_ID=42 SLURM_NTASKS=$((nodes * tasks)) exec bash ./spooled "$@"
        """,
    )
    stand_in(
        folder,
        "srun",
        """
        tasks=()
        trap 'kill -TERM "${tasks[@]/#/-}"' TERM
        shift
        export SLURM_STEP_ID=0
        for ((i = 0; i < SLURM_NTASKS; i++)); do
            SLURM_PROCID=$i setsid "$@" &
            tasks+=($!)
        done
        status=0
        for task in "${tasks[@]}"; do
            while kill -0 $task 2>/dev/null; do wait $task || status=$?; done
        done
        exit $status
        """,
    )
    stand_in(folder, "scontrol", "")


def test_a_slurm_job_runs_one_process_for_each_gpu(tmp_path):
    slurm(tmp_path, f'echo "$SLURM_PROCID of $SLURM_NTASKS" >> {tmp_path}/tasks')
    done = launch(tmp_path, "slurm.sh", "--nodes", "2", "--gpus", "2", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "tasks").read_text().splitlines()) == [f"{i} of 4" for i in range(4)]
    assert calls(tmp_path).count("cascade train " + " ".join(TRAIN)) == 4
    assert not any(call.startswith("scontrol") for call in calls(tmp_path))


@pytest.mark.parametrize(
    "status,restarts,requeued", [(1, "0", True), (1, "3", False), (2, "0", False)]
)
def test_a_crashed_slurm_job_goes_back_to_the_queue(status, restarts, requeued, tmp_path):
    slurm(tmp_path, f"exit {status}")
    done = launch(
        tmp_path, "slurm.sh", "--gpus", "1", "--retries", "3", *TRAIN, SLURM_RESTART_COUNT=restarts
    )
    assert ("scontrol requeue 42" in calls(tmp_path)) == requeued
    assert done.returncode == (0 if requeued else status)


def test_a_preempted_slurm_job_saves_and_goes_back_to_the_queue(tmp_path):
    slurm(tmp_path, saving(tmp_path))
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", "--gpus", "2", *TRAIN],
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    for i in range(2):
        wait_for(tmp_path / f"started{i}")
    os.kill(int((tmp_path / "job_pid").read_text()), signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert "scontrol requeue 42" in calls(tmp_path)


# Cloud TPU, with a gcloud that plays a slice


def test_a_preempted_tpu_slice_is_replaced_and_the_last_one_deleted(tmp_path):
    """The first slice is suspended while it trains; on the second, training ends."""
    stand_in(
        tmp_path,
        "gcloud",
        f"""
        cd {tmp_path}
        case "$*" in
            *" create "*) echo slice >> slices; echo ACTIVE > state; rm -f training ;;
            *" describe "*) cat state 2>/dev/null ;;
            *" delete "*) rm state ;;
            *systemd-run*) echo active > training ;;
            *is-active*)
                cat training 2>/dev/null || echo inactive
                if [ -e training ] && [ $(wc -l < slices) = 1 ]; then
                    [ -e looked ] && echo SUSPENDED > state && : > training
                    touch looked
                elif [ -e training ]; then
                    echo inactive > training
                fi ;;
        esac
        """,
    )
    stand_in(tmp_path, "git", "")
    done = launch(tmp_path, "tpu.sh", "--poll", "0", "up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "state").exists()
    did = [
        word
        for call in calls(tmp_path)
        for word in ("create", "scp", "systemd-run", "delete")
        if f"{word} " in call
    ]
    assert did == ["create", "scp", "systemd-run", "delete"] * 2


def test_a_slice_that_trains_already_is_followed_and_not_started_again(tmp_path):
    stand_in(
        tmp_path,
        "gcloud",
        f"""
        cd {tmp_path}
        case "$*" in
            *" describe "*) echo ACTIVE ;;
            *is-active*)
                echo x >> asked
                [ $(wc -l < asked) -gt 2 ] && echo inactive || echo active ;;
        esac
        """,
    )
    done = launch(tmp_path, "tpu.sh", "--poll", "0", "up", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert not any("systemd-run" in call or " create " in call for call in calls(tmp_path))


def test_the_gpu_recipe_shares_its_minutes_and_packs_the_model_in_parts(tmp_path):
    runs = tmp_path / "runs"
    weights = f"mkdir -p {runs}/model; head -c 31M /dev/urandom > {runs}/model/w"
    stand_in(tmp_path, "cascade", f"if [ $1 = export ]; then {weights}; fi")
    done = launch(tmp_path, "train_scenes_gpu.sh", str(runs), "--minutes", "6", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    told = {}
    for call in calls(tmp_path):
        verb, *words = call.split()[1:]
        if verb == "train":
            told[Path(words[0]).stem] = float(words[words.index("--minutes") + 1])
            assert (LAUNCH.parent / words[0]).is_file() and words[-2:] == ["--batch-size", "8"]
    assert told == {"base64": 6.0, "sr256": pytest.approx(2.7), "sr1024": pytest.approx(1.5)}
    parts = sorted((runs / "parts").iterdir())
    assert len(parts) == 3 and max(part.stat().st_size for part in parts) < 16 * 2**20
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as packed:
        content = packed.extractfile("model/w")
        assert content is not None and content.read() == (runs / "model" / "w").read_bytes()


def test_the_gpu_recipe_ends_with_a_part_that_failed(tmp_path):
    stand_in(tmp_path, "cascade", "case $2 in *sr256*) echo no >&2; exit 2;; esac")
    done = launch(tmp_path, "train_scenes_gpu.sh", str(tmp_path / "runs"))
    assert done.returncode != 0 and "no" in done.stderr
    assert not any(call.startswith("cascade export") for call in calls(tmp_path))


@pytest.mark.parametrize("script", ["train_scenes.sh", "train_scenes_gpu.sh"])
@pytest.mark.parametrize("word", ["--help", "-h", "--dry-run"])
def test_an_option_in_place_of_a_folder_trains_nothing(script, word, tmp_path):
    done = subprocess.run(
        ["bash", str(LAUNCH / script), word],
        cwd=tmp_path,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"bash launch/{script}" in done.stdout and not done.stderr
    assert not (LAUNCH.parent / word).exists()
