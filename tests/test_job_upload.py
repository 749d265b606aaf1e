"""What ``deploy/submit.sh`` really uploads, seen by a dashboard of our own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from rl_edit.provenance import SOURCES

SUBMIT = Path(__file__).resolve().parent.parent / "deploy" / "submit.sh"
ANSWER = {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__}


@dataclass
class Dashboard:
    """A dashboard that keeps packages and jobs and runs nothing."""

    address: str = ""
    packages: list[bytes] = field(default_factory=list)
    jobs: list[dict[str, str]] = field(default_factory=list)

    def names(self) -> list[str]:
        """Lists the files of the only package."""
        (package,) = self.packages
        entries = zipfile.ZipFile(io.BytesIO(package)).namelist()
        return sorted(name for name in entries if not name.endswith("/"))


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    kept = Dashboard()

    class Answers(BaseHTTPRequestHandler):
        def answer(self, code: int, body: object) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def do_GET(self) -> None:
            known = self.path == "/api/version"
            self.answer(200 if known else 404, ANSWER if known else {})

        def do_PUT(self) -> None:
            kept.packages.append(self.body())
            self.answer(200, {})

        def do_POST(self) -> None:
            kept.jobs.append(json.loads(self.body()))
            name = kept.jobs[-1]["submission_id"]
            self.answer(200, {"job_id": name, "submission_id": name})

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield kept
    server.shutdown()
    server.server_close()


def submit(dashboard: Dashboard, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [str(SUBMIT), "--no-wait", "--attempt", "1", *arguments],
        env={
            **outside,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_ADDRESS": dashboard.address,
            "TMPDIR": str(here.parent),
        },
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with settings, photographs, links out of it and to its parent, and a run."""
    folder = tmp_path / "project"
    for name in ("photos", "runs/demo", "learner"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.bin").write_bytes(b"x" * 1000)
    (folder / "photos.yaml").write_text("name: photos\n")
    (folder / "up").symlink_to("..")
    (folder / "outside").symlink_to("/usr/share")
    return folder


def test_only_sources_and_named_files_are_uploaded_and_all_of_it_is_said(
    dashboard: Dashboard, here: Path
) -> None:
    result = submit(dashboard, here, "--", "train", "photos.yaml", "--run-dir", "/shared/runs/x")
    assert result.returncode == 0, result.stderr
    names = dashboard.names()
    assert "rl_edit/__main__.py" in names and "learner/learner.py" in names
    assert [name for name in names if name.partition("/")[0] not in SOURCES] == ["photos.yaml"]
    assert f"{len(names)} files" in result.stderr and "photos.yaml" in result.stderr
    (job,) = dashboard.jobs
    assert job["entrypoint"] == ("python -m rl_edit train photos.yaml --run-dir /shared/runs/x")
    # The copy that Ray packed is gone.
    assert list(here.parent.iterdir()) == [here]


def test_a_job_that_would_miss_a_file_is_not_submitted(dashboard: Dashboard, here: Path) -> None:
    words = ["train", "photos.yaml", "data.path=photos", "--run-dir", "/shared/runs/x"]
    result = submit(dashboard, here, "--", *words)
    assert result.returncode == 2 and dashboard.packages == dashboard.jobs == []
    (line,) = result.stderr.splitlines()
    assert "--include photos" in line
    result = submit(dashboard, here, "--include", "photos", "--", *words)
    assert result.returncode == 0 and "photos/file.bin" in dashboard.names()
