"""What the scripts in launch/ are given is data: none of it is run, and none becomes YAML."""

import re
import shlex
import subprocess

import pytest
from test_launch import LAUNCH, TRAIN, calls, launch, manifest, stand_in

COMMANDS = ("cascade", "sbatch", "srun", "scontrol", "gcloud", "git", "kubectl", "docker", "sleep")
BEFORE = {"train_scenes_gpu.sh": ["runs"], "soak.sh": ["runs"]}
AFTER = {
    "tpu.sh": ["up", *TRAIN],
    "gke.sh": ["apply", *TRAIN],
    "train_scenes_gpu.sh": [],
    "soak.sh": [],
}
NEEDED = {"gke.sh": ["--image", "i", "--bucket", "b"]}
HOSTILE = [
    "$(touch X)",
    "`touch X`",
    "a[$(touch X)]",
    "topology[$(touch X)]",
    "1; touch X",
    '1 } END { system("touch X")',
    "a\nhostNetwork: true",
    "a\n",
    "a: {b: c}",
    "a'b",
    'a"b',
    "a\\",
    "a b",
    "-x",
    "../../a b",
    "é",
    "",
]


def options() -> list[tuple[str, str]]:
    """Each option with a value that the help of a script lists."""
    found = []
    for script in sorted(LAUNCH.glob("*.sh")):
        head = script.read_text().partition("set -euo")[0]
        listed = re.findall(r"^# +(--[a-z-]+) +[A-Z]", head, re.MULTILINE)
        listed += re.findall(r"^# (--minutes|--seed) ", head, re.MULTILINE)
        found += [(script.name, option) for option in listed]
    return found


def test_the_help_lists_every_option_that_the_scripts_take():
    for script in LAUNCH.glob("*.sh"):
        taken = set(re.findall(r"(--[a-z-]+)[^\n]*\bvalue [a-z]+ ", script.read_text()))
        assert {option for name, option in options() if name == script.name} == taken
    assert len(options()) == 28


@pytest.mark.parametrize("script,option", options())
def test_a_hostile_value_is_refused_in_a_line_and_nothing_is_run(script, option, tmp_path):
    for name in COMMANDS:
        stand_in(tmp_path, name, "")
    before, after = BEFORE.get(script, []), AFTER.get(script, list(TRAIN))
    for value in HOSTILE:
        if (option, value) == ("--sbatch", "-x"):
            continue  # an option of sbatch
        words = (*before, *NEEDED.get(script, []), option, value, *after)
        done = launch(tmp_path, script, *words)
        assert done.returncode == 2, (value, done.stderr)
        assert done.stderr.startswith(f"error: {option} must be "), (value, done.stderr)
        assert done.stderr.count("\n") == 1
    assert calls(tmp_path) == []
    assert {file.name for file in tmp_path.iterdir()} == {"bin"}


@pytest.mark.parametrize("script", ["gke.sh", "tpu.sh"])
def test_an_unknown_action_or_option_is_told_in_one_line(script, tmp_path):
    for word in ("a\nb: $(touch X)", "--a\nb"):
        done = launch(tmp_path, script, word)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["123", "null", "1e3", "0x10", "no", "12:30"])
def test_a_name_that_yaml_would_read_as_another_type_stays_text(value, tmp_path):
    own = ["--name", "--accelerator", "--bucket", "--service-account"]
    own = own if ":" not in value else []
    words = [word for option in [*own, "--image"] for word in (option, value)]
    found = manifest(tmp_path, *words)
    (jobs,) = found["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == value
    if own:
        (volume,) = pod["volumes"]
        told = (
            found["metadata"]["name"],
            pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"],
            volume["csi"]["volumeAttributes"]["bucketName"],
            pod["serviceAccountName"],
        )
        assert told == (value,) * 4


WORDS = [
    *("$(touch X)", "`touch X`", "a[$(touch X)]", 'a", "b', "a\\", "a'b", "${NAME}", "&", "é"),
    *("a\nhostNetwork: true", "\n---\nkind: Pod\n", "\t", "\r", "# a", "", "END\nEND", "a  b"),
]


def test_the_words_of_a_training_reach_the_pods_as_they_are(tmp_path):
    stand_in(tmp_path, "kubectl", f"cat > {tmp_path}/manifest.yaml")
    found = manifest(tmp_path, "apply", *TRAIN, *WORDS)
    (jobs,) = found["spec"]["replicatedJobs"]
    (container,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
    # `manifest` adds an action and a training of its own, which are words here
    assert container["args"][: len(TRAIN) + len(WORDS)] == [*TRAIN, *WORDS]
    assert not (tmp_path / "X").exists()
    options = ("--image", "i", "--bucket", "b", "apply", *TRAIN)
    done = launch(tmp_path, "gke.sh", *options, "a\x1bb")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "control character" in done.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "slurm.sh", "tpu.sh"])
def test_the_words_of_a_training_are_not_run(script, tmp_path):
    """What a dry run prints is pasted, and what `tpu.sh` sends is run by the workers' shell."""
    action = ["run"] if script == "tpu.sh" else []
    done = launch(tmp_path, script, "--dry-run", *action, *TRAIN, *WORDS)
    assert done.returncode == 0, done.stderr
    name = {"single_node.sh": "cascade", "slurm.sh": "sbatch", "tpu.sh": "gcloud"}[script]
    printed = done.stdout.partition("\nin the job: ")[0]

    def read(line: str) -> list[str]:
        """What a shell makes of a line, whose first word is not run but noted."""
        note = f"{name}() {{ printf '%s\\0' \"$@\"; }}; sudo() {{ :; }}\n"
        done = subprocess.run(
            ["bash", "-c", note + line], cwd=tmp_path, capture_output=True, check=True
        )
        return done.stdout.decode().split("\0")[:-1]

    words = read(printed)
    if script == "tpu.sh":
        (command,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
        words = read(command.replace("sudo systemd-run", name))
    assert words[-len(WORDS) :] == WORDS
    assert list(tmp_path.iterdir()) == []


def test_what_options_of_sbatch_look_like_is_taken(tmp_path):
    stand_in(tmp_path, "sbatch", "")
    own = ["--gres=gpu:a100:4", "--exclude=node[1-3,7]", "--constraint=a100&fast", "-pgpu"]
    words = [word for option in own for word in ("--sbatch", option)]
    done = launch(tmp_path, "slurm.sh", "--time", "1-12:00:00", *words, *TRAIN)
    assert done.returncode == 0, done.stderr
    (call,) = calls(tmp_path)
    assert " ".join(own) in call and "--time=1-12:00:00" in call
    assert shlex.join(own).count("'") > 0  # some need quotes, and have reached sbatch without
