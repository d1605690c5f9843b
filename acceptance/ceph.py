"""A Ceph cluster of one monitor and one disk, with the S3 gateway before it.

    python acceptance/ceph.py PROGRAMS FOLDER GATEWAY_PORT MONITOR_PORT

It serves until its input ends. PROGRAMS is where Debian's packages are unpacked: nothing needs to
be installed, and nobody needs to be root.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

HOST = "127.0.0.1"
KEY, SECRET = "tester", "testing"
CACHE = Path(__file__).parent.parent / ".acceptance"
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
USEFUL = re.compile("lib|ceph|radosgw")
"""Names of packages. The others that these depend on are for real disks, or in Python."""
STORE_BYTES = 8 << 30
"""Of a sparse file."""
WAITS = {
    "paxos propose interval": 0.05,
    "objecter tick interval": 0.25,
    "objecter timeout": 0.5,
    "osd client watch timeout": 3,
}
"""In seconds. After a kill it would take Ceph half a minute to see that all is well again."""


def unpacked_programs() -> Path:
    """Downloads the packages when it is called for the first time."""
    unpacked, archives, partial = (CACHE / name for name in ("ceph", "archives", "partial"))
    if not unpacked.exists():
        for folder in (archives, partial):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _output("apt-get", "download", *_missing_packages(), cwd=archives)
        for archive in archives.iterdir():
            _output("dpkg", "-x", str(archive), str(partial))
        shutil.rmtree(archives)
        partial.rename(unpacked)
    return unpacked


def _missing_packages() -> list[str]:
    """`PACKAGES` and what they depend on, as `name=version`, without those that are installed."""
    listed = _output("apt-get", "-s", "--no-install-recommends", "install", *PACKAGES)
    found = re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+)", listed, re.MULTILINE)
    return [f"{name}={version}" for name, version in found if USEFUL.match(name)]


def _output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


@dataclass
class Cluster:
    programs: Path
    folder: Path
    gateway_port: int
    monitor_port: int

    def serve(self) -> None:
        """Ends with its process group when one of the daemons ends, or the input does."""
        os.chdir(self.folder)
        os.environ.update(self._environment())
        if not (self.folder / "ceph.conf").exists():
            self._prepare()
        daemons = [_start("ceph-mon", "-i", "a"), _start("ceph-osd", "-i", "0")]
        user = self.folder / "user.log"
        if not user.exists():
            user.write_text(_output("radosgw-admin", "user", "create", *_user()))
        daemons.append(_start("radosgw", "-n", "client.rgw"))
        while not select.select([sys.stdin], [], [], 0.5)[0]:
            if any(daemon.poll() is not None for daemon in daemons):
                self._report()
                break
        os.killpg(0, signal.SIGKILL)

    def _prepare(self) -> None:
        cluster, monitor = str(uuid4()), f"[v2:{HOST}:{self.monitor_port}]"
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        self._write_conf(cluster, monitor)
        _output("monmaptool", "--create", "--fsid", cluster, "--addv", "a", monitor, "monmap")
        _output("osdmaptool", "--createsimple", "1", "osdmap")
        maps = ("--monmap", "monmap", "--osdmap", "osdmap")
        _output("ceph-mon", "-i", "a", "--mkfs", *maps)
        _output("ceph-osd", "-i", "0", "--mkfs", "--no-mon-config")

    def _write_conf(self, cluster: str, monitor: str) -> None:
        options = {
            "fsid": cluster,
            "mon host": monitor,
            "public addr": HOST,
            "cluster addr": HOST,
            **{f"auth {part} required": "none" for part in ("cluster", "service", "client")},
            **{f"ms mon {part} mode": "crc" for part in ("cluster", "service", "client")},
            "run dir": self.folder,
            "admin socket": "",
            "pid file": "",
            "mon data": self.folder / "mon",
            "osd data": self.folder / "osd",
            "rgw data": self.folder,
            "keyring": self.folder / "keyring",
            "log file": self.folder / "$name.log",
            "mon cluster log file": "/dev/null",
            "debug rocksdb": 0,
            "bluestore block size": STORE_BYTES,
            **WAITS,
            "mon allow pool size one": "true",
            "osd pool default size": 1,
            "osd pool default pg num": 4,
            "osd pool default pgp num": 4,
            "osd pool default pg autoscale mode": "off",
            "osd crush update on start": "false",
            "osd crush chooseleaf type": 0,
            "rgw frontends": f"beast endpoint={HOST}:{self.gateway_port} tcp_nodelay=1",
            "rgw thread pool size": 64,
        }
        for option, name in (
            ("plugin dir", "ceph"),
            ("erasure code dir", "ceph/erasure-code"),
            ("osd class dir", "rados-classes"),
        ):
            for folder in self._libraries(name):
                options[option] = folder
        parser = ConfigParser(interpolation=None)
        parser["global"] = {name: str(value) for name, value in options.items()}
        with (self.folder / "ceph.conf").open("w") as file:
            parser.write(file)

    def _report(self) -> None:
        for log in self.folder.glob("*.log"):
            sys.stderr.write(f"{log}:\n{log.read_text()[-2000:]}\n")
        sys.stderr.flush()

    def _libraries(self, name: str = "") -> list[Path]:
        return [path for path in self.programs.glob(f"**/lib/*-linux-gnu/{name}") if path.is_dir()]

    def _environment(self) -> dict[str, str]:
        libraries = [*self._libraries(), *self._libraries("ceph")]
        return {
            "CEPH_CONF": str(self.folder / "ceph.conf"),
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PATH": f"{self.programs / 'usr/bin'}:{os.environ['PATH']}",
        }


def _start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*command, "-f"], stdin=subprocess.DEVNULL)


def _user() -> list[str]:
    options = {"uid": KEY, "display-name": KEY, "access-key": KEY, "secret-key": SECRET}
    return [f"--{name}={value}" for name, value in options.items()]


if __name__ == "__main__":
    own_programs, own_folder, *own_ports = sys.argv[1:]
    Cluster(Path(own_programs), Path(own_folder), *map(int, own_ports)).serve()
