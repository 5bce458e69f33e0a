"A real, private Slurm on this machine: munged, slurmctld and slurmd of our own, in a folder of their own, gone afterwards."
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
CPUS = 8           # as Slurm counts them: more than there may be, so that a job that only sleeps takes none from the others
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired: 5 s here, 2 minutes otherwise
AuthInfo=socket={folder}/munge.socket,cred_expire=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=0,bf_interval=2{scheduler}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MessageTimeout=20
SlurmctldTimeout=60
SlurmdTimeout=60
MinJobAge=600
# a machine that was set DOWN stays so until it is resumed, and does not come back by its daemon's next report
ReturnToService=1
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
GresTypes=seat
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=2000 Gres=seat:2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE MaxTime=120 DefaultTime=30
PartitionName=graceful Nodes={host} PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=120
PartitionName=steady Nodes={host} PriorityTier=1 PreemptMode=OFF MaxTime=120
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF MaxTime=120
"""


def missing() -> str | None:
    "Why Slurm cannot be started here, in one sentence; none when it can."
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a private Slurm is started by root only; run the tests as root, with the packages of `apt-get install slurm-wlm munge`"
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"Slurm is not installed ({', '.join(absent)} not found); get it with `apt-get install slurm-wlm munge`"
    return None


@dataclass
class Slurm:
    "A running Slurm: where it lives and what is needed to reach it."
    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen]

    def call(self, *command: str, check: bool = True) -> str:
        "What a Slurm command prints."
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        "What scontrol knows of a job or array task."
        words = self.call("scontrol", "--oneliner", "show", "job", job, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def words(self) -> str:
        "The last lines of all logs."
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                         for log in sorted(self.folder.glob("*.log")))


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _wait(condition, what: str, slurm: Slurm, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        dead = [name for name, process in slurm.processes.items() if process.poll() is not None]
        if dead or time.monotonic() > end:
            raise RuntimeError(f"{what}: {f'{dead[0]} ended' if dead else f'not within {seconds:.0f} s'}\n{slurm.words()}")
        time.sleep(0.1)


def _start(slurm: Slurm, name: str, *arguments: str) -> None:
    with open(slurm.folder / f"{name}.out.log", "w") as log:
        slurm.processes[name] = subprocess.Popen([shutil.which(name), *arguments], env=os.environ | slurm.environment, stdin=subprocess.DEVNULL,
                                                 stdout=log, stderr=log, start_new_session=True)


def _write(folder: Path, host: str, scheduler: str) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    conf = CONF.format(host=host, ports=_free_ports(2), folder=folder, cpus=CPUS, scheduler="".join(f",{word}" for word in scheduler.split()))
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text("Name=seat Count=2\n")                # something to be preempted for
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")         # read even where nothing uses it


def _stop(slurm: Slurm) -> None:
    "Cancel all jobs, then end the daemons and every process that they left, jobs first."
    with contextlib.suppress(Exception):
        slurm.call("scancel", "--full", "--signal=KILL", *slurm.call("squeue", "-h", "-o", "%A").split(), check=False)
    _kill([p for process in slurm.processes.values() for p in _tree(process.pid)] + _strays(slurm))
    for name in ("slurmd", "slurmctld", "munged"):
        if process := slurm.processes.get(name):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait(10)
    _kill(_strays(slurm))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def steps(slurm: Slurm) -> list[psutil.Process]:
    "The slurmstepds: one for each job's script and each step of it that is not at its end."
    return [process for process in _strays(slurm) if process.info["name"] == "slurmstepd"]


def _strays(slurm: Slurm) -> list[psutil.Process]:
    "What else belongs to this Slurm: jobs by their environment, slurmstepds (which write their title over theirs) by the logs they hold open."
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.environ().get("SLURM_CONF") == slurm.environment["SLURM_CONF"] and process.pid != os.getpid()
            if ours or process.info["name"].startswith("slurm") and any(f.path.startswith(f"{slurm.folder}/") for f in process.open_files()):
                found.append(process)
    return found


@contextlib.contextmanager
def private_slurm(scheduler: str = ""):   # more words for SchedulerParameters
    "Start Slurm, put it into this process's environment, and take all of it down at the end, whatever happens."
    folder, host = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), socket.gethostname().split(".")[0]
    folder.chmod(0o755)                                                      # munged wants a socket folder that all may enter
    slurm = Slurm(folder, {"SLURM_CONF": str(folder / "slurm.conf")}, {})
    before = os.environ.get("SLURM_CONF")
    try:
        _write(folder, host, scheduler)
        _start(slurm, "munged", "--foreground", "--force", "--num-threads=2", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
               f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log")
        _wait((folder / "munge.socket").exists, "munged", slurm)
        _start(slurm, "slurmctld", "-D", "-c", "-f", slurm.environment["SLURM_CONF"])
        _start(slurm, "slurmd", "-D", "-N", host, "-f", slurm.environment["SLURM_CONF"])
        _wait(lambda: "idle" in slurm.call("sinfo", "-h", "-o", "%T", check=False), "the node's registration", slurm)
        os.environ |= slurm.environment
        yield slurm
    finally:
        os.environ.pop("SLURM_CONF", None) if before is None else os.environ.update(SLURM_CONF=before)
        _stop(slurm)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm():
    "A private Slurm for the tests of a file; skips where there is none."
    if why := missing():
        pytest.skip(why)
    with private_slurm() as running:
        yield running
