"""The files of docker/: they parse, all run one line, and that line runs on two nodes.

Images cannot be built and clusters not be had in a test; what is checked is what can be without.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from sentences import read, save_checkpoint, write_lines

from lirpa_megatron import __version__
from lirpa_megatron.cli.arguments import parse_arguments
from lirpa_megatron.parallel import runtime

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
VERIFY = (
    "-m lirpa_megatron verify --load /checkpoint --data /data/data.jsonl "
    "--config /config/job.yaml --output /results/results.jsonl --resume"
).split()
MOUNTS = {"/checkpoint", "/data", "/config", "/results"}
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
SERVICES = ["gpu", "cpu"]


def load(name):
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


def service(name):
    (compose,) = load("compose.yaml")
    return compose["services"][name]


def pod_and_container(name):
    """The pod's specification of a Kubernetes file, and its one container."""
    documents = load(name)
    pod = documents[0]["spec"]["template"]["spec"]
    if documents[0]["kind"] == "TrainingRuntime":
        (job,) = pod["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
    else:
        pod = documents[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$STUBS/srun.called"
trap 'echo TERM > "$STUBS/srun.ended"; exit 143' TERM
[ "$SECONDS_TO_RUN" = 0 ] && exit "$STATUS"
for _ in $(seq 100); do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" > "$STUBS/scontrol.called"; fi
"""


@contextlib.contextmanager
def slurm(folder, seconds="0", status="0", **changed):
    """slurm.sh, started as Slurm would, with stand-ins for srun and scontrol."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "STUBS": str(folder),
        "SECONDS_TO_RUN": seconds, "STATUS": status,
        "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": "/submit",
        "CHECKPOINT": "/my/checkpoint", "DATA": "/my/data.jsonl", "RESULTS": "/my/results",
        "IMAGE": "lirpa-megatron", **changed,
    }
    process = subprocess.Popen(
        ["bash", str(DOCKER / "slurm.sh")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def slurm_command(folder):
    with slurm(folder) as process:
        _, error = process.communicate(timeout=30)
        assert process.returncode == 0, error
    return (folder / "srun.called").read_text().split("\0")[:-1]


def commands(folder):
    """File -> the command that it starts, from torchrun on."""
    found = {f"compose.yaml {name}": service(name)["command"] for name in SERVICES}
    found["slurm.sh"] = slurm_command(folder)
    found["job.yaml"] = pod_and_container("kubernetes/job.yaml")[1]["command"]
    found["trainjob.yaml"] = load("kubernetes/trainjob.yaml")[1]["spec"]["trainer"]["command"]
    return {name: command[command.index("torchrun"):] for name, command in found.items()}


def test_every_file_runs_the_same_line(tmp_path):
    found = commands(tmp_path)
    assert len(found) == 5
    for name, command in found.items():
        assert command[-len(VERIFY):] == VERIFY, name
    readme = (DOCKER / "README.md").read_text()
    assert shlex.join(VERIFY) in " ".join(readme.replace("\\\n", " ").split())


def test_torchrun_takes_what_stands_before_the_line(tmp_path):
    from torch.distributed.run import get_args_parser

    for name, command in commands(tmp_path).items():
        launcher = get_args_parser().parse_args(command[1:])
        assert launcher.training_script == "lirpa_megatron" and launcher.module, name
        assert launcher.training_script_args == VERIFY[2:], name
        sizes = {"slurm.sh": ("2", "8"), "trainjob.yaml": ("1:1", "1")}.get(name, ("1:1", "2"))
        assert (launcher.nnodes, launcher.nproc_per_node) == sizes, name
        if name == "slurm.sh":
            assert (launcher.rdzv_backend, launcher.rdzv_id) == ("c10d", "77")
            assert launcher.rdzv_endpoint == "node1:29500"
        else:
            assert launcher.standalone == (name != "trainjob.yaml")


def test_the_command_line_takes_the_line_and_the_options():
    line = list(VERIFY[2:])
    line[line.index("--config") + 1] = str(DOCKER / "job.yaml")
    arguments = parse_arguments(line, __version__)
    assert arguments["command"] == "verify" and arguments["resume"] is True
    assert str(arguments["load"]) == "/checkpoint"
    assert str(arguments["output"]) == "/results/results.jsonl"
    (options,) = load("job.yaml")
    assert len(options) >= 3
    assert {key.replace("-", "_") for key in options} <= arguments.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_compose_mounts_what_the_line_names(name):
    it = service(name)
    targets = {volume.split(":/", 1)[1].split(":")[0]: volume for volume in it["volumes"]}
    assert targets.keys() == {"checkpoint", "data/data.jsonl", "config/job.yaml", "results"}
    assert {t for t, volume in targets.items() if not volume.endswith(":ro")} == {"results"}
    assert (DOCKER / it["build"]["context"] / it["build"]["dockerfile"]).is_file()
    assert it["profiles"] == [name] and it["cap_drop"] == ["ALL"]


def test_compose_gives_the_gpu_service_as_many_gpus_as_processes():
    (device,) = service("gpu")["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert f"--nproc-per-node={device['count']}" in service("gpu")["command"]
    assert "deploy" not in service("cpu")


@pytest.mark.parametrize("name", ["kubernetes/job.yaml", "kubernetes/trainjob.yaml"])
def test_kubernetes_mounts_what_the_line_names(name):
    pod, container = pod_and_container(name)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == MOUNTS | {"/dev/shm"}
    read_only = {path for path, mount in mounts.items() if mount.get("readOnly")}
    assert read_only == MOUNTS - {"/results"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in mounts.values()}
    claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values()
              if "persistentVolumeClaim" in v}
    assert claims == {"checkpoint", "data", "results"}
    assert volumes["config"]["configMap"]["name"] == "lirpa-megatron"
    assert pod["restartPolicy"] == "Never" and pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_job_gives_its_pod_as_many_gpus_as_processes():
    (job,) = load("kubernetes/job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    _, container = pod_and_container("kubernetes/job.yaml")
    count = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node={count}" in container["command"]


def test_the_trainjob_runs_on_its_runtime():
    runtime, job = load("kubernetes/trainjob.yaml")
    assert {d["apiVersion"] for d in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    assert runtime["spec"]["mlPolicy"]["torch"] == {}  # sets PET_NNODES and the others
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    _, container = pod_and_container("kubernetes/trainjob.yaml")
    assert replicated["name"] == container["name"] == "node"  # what Trainer looks for
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 2


def test_slurm_mounts_what_the_line_names_and_asks_to_be_queued_again(tmp_path):
    command = slurm_command(tmp_path)
    (mounts,) = (word for word in command if word.startswith("--container-mounts="))
    assert mounts.removeprefix("--container-mounts=").split(",") == [
        "/my/checkpoint:/checkpoint:ro", "/my/data.jsonl:/data/data.jsonl:ro",
        "/submit/docker/job.yaml:/config/job.yaml:ro", "/my/results:/results",
    ]
    directives = re.findall(r"^#SBATCH (\S+)", (DOCKER / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(directives)


def test_slurm_queues_the_job_again_when_its_time_is_nearly_up(tmp_path):
    with slurm(tmp_path, seconds="10") as process:
        end = time.monotonic() + 20
        while not (tmp_path / "srun.called").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)  # until srun's trap is set
        process.send_signal(signal.SIGUSR1)  # to the script alone, as B: says
        _, error = process.communicate(timeout=20)
    assert process.returncode == 0 and "queueing the job again" in error
    assert (tmp_path / "scontrol.called").read_text().split() == ["requeue", "77"]
    assert (tmp_path / "srun.ended").read_text().strip() == "TERM"


def test_slurm_ends_with_the_jobs_status_and_does_not_queue_it_again(tmp_path):
    with slurm(tmp_path, status="3") as process:
        process.communicate(timeout=20)
    assert process.returncode == 3 and not (tmp_path / "scontrol.called").exists()


def test_slurm_says_what_is_not_given(tmp_path):
    with slurm(tmp_path, DATA="") as process:
        _, error = process.communicate(timeout=20)
    assert process.returncode != 0 and "DATA: file of inputs" in error
    assert not (tmp_path / "srun.called").exists()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_pin_what_they_install(name):
    text = (DOCKER / name).read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    assert re.fullmatch(r"[0-9a-f]{40}", arguments["AUTO_LIRPA"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", arguments["MEGATRON_CORE"])
    (image,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert not image.endswith("latest") and "${" in image.split(":")[1]
    for used in re.findall(r"\$\{(\w+)\}", text):
        assert used in arguments
    assert re.search(r"pip install [^&]*--no-deps[^&]*auto_LiRPA", text)
    assert re.search(r"^USER 1000", text, re.MULTILINE)


def test_both_images_install_the_same_versions():
    pins = [re.findall(r"^ARG (?:MEGATRON_CORE|AUTO_LIRPA)=.*$",
                       (DOCKER / name).read_text(), re.MULTILINE) for name in DOCKERFILES]
    assert len(pins[0]) == 2 and pins[0] == pins[1]


def test_the_build_context_has_what_the_package_is_installed_from():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and all((ROOT / name).exists() for name in kept)
    assert {"lirpa_megatron", "setup.py", "pyproject.toml", "README.md"} <= kept


def tool(name):
    """A linter on the path or beside python; the test is skipped without it."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return found or pytest.skip(f"{name} is not installed: pip install {name}-py or {name}-bin")


@pytest.mark.parametrize("command", [["bash", "-n"], ["shellcheck"]], ids=lambda c: c[0])
def test_the_shell_script_is_clean(command):
    run = subprocess.run([tool(command[0]), *command[1:], str(DOCKER / "slurm.sh")],
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_images_files_are_clean(name):
    run = subprocess.run([tool("hadolint"), str(DOCKER / name)],
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def slurms_agent(_, port):
    """Options and environment of a torchrun agent as in slurm.sh."""
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=77"]
    return [*options, f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"], {}


def trainers_agent(node, port):
    """The same, as Kubeflow Trainer sets it for trainjob.yaml."""
    return [], {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(node),
                "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "stages"), [
    (slurms_agent, 1), (trainers_agent, 1), (trainers_agent, 2),
])
def test_two_nodes_run_the_line_and_find_what_one_process_finds(agent, stages, tmp_path):
    mounted = {"/checkpoint": tmp_path / "bert", "/data": tmp_path, "/config": tmp_path}
    with runtime.session():
        save_checkpoint("bert", mounted["/checkpoint"], layers=stages)
    write_lines(tmp_path / "data.jsonl", {"sentence": "w3 W7 unheard"}, {"sentence": "w9"})
    options = yaml.safe_load((DOCKER / "job.yaml").read_text())
    assert options["pipeline-parallel-size"] == 1
    options |= {"attack-steps": 2, "attack-restarts": 1, "tolerance": 0.3}  # quick
    found = []
    for nodes in (1, 2):
        options["pipeline-parallel-size"] = stages if nodes > 1 else 1
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(options))
        mounted["/results"] = tmp_path / f"{nodes}"
        mounted["/results"].mkdir()
        line = " ".join(VERIFY)
        for inside, outside in mounted.items():
            line = line.replace(f" {inside}", f" {outside}")
        port, started = free_port(), []
        for node in range(nodes):
            launch, extra = agent(node, port) if nodes > 1 else ([], {})
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}
            launch = ["-m", "torch.distributed.run", *launch] if nodes > 1 else []
            started.append(subprocess.Popen(
                [sys.executable, *launch, *line.split()], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ))
        try:
            for process in started:
                _, error = process.communicate(timeout=300)
                assert process.returncode == 0, error
        finally:
            for process in started:
                process.kill()
        results = read(mounted["/results"] / "results.jsonl")
        assert {r["tensor_parallel"] for r in results} == {1 if stages > 1 else nodes}
        assert {r.get("pipeline_parallel", 1) for r in results} == {stages if nodes > 1 else 1}
        found.append([(r["property"], r["result"], r["certified_radius"]) for r in results])
    assert len(found[0]) == len(found[1]) == 2
    for (name, result, radius), (same, also, other) in zip(*found, strict=True):
        assert (name, result) == (same, also) and radius > 0
        assert radius == pytest.approx(other, rel=1e-6)
