#!/usr/bin/env bash
# Submits one rl-edit command to a running Ray cluster, waits for its end, and says how it ended.
#
# The sources of rl-edit and the files that the command names are uploaded as the job's working
# directory, so the cluster needs the dependencies but not this package. The job outlives this script: interrupting it here stops the waiting, not
# the job.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: RAY_ADDRESS=http://HOST:8265 deploy/submit.sh [OPTIONS] -- VERB ARGUMENTS...

  deploy/submit.sh -- train --preset tiny-rc-grpo --run-dir /shared/runs/first train.updates=2

  --name NAME    first part of the submission id                      (default: rl-edit)
  --attempt ID   second part; a submission id can be used only once   (default: the time now)
  --include PATH take a file or folder of the current directory along; may be repeated
  --limit MIB    refuse to upload more than this, at most 512         (default: 100)
  --no-wait      submit and return

The job takes along rl-edit's own sources, the YAML files that the command names, and your modules
that these name (kind: my_methods:Ratio). Everything else of the directory stays where it is: give
data by absolute paths that every node can read, or --include it.

environment:
  RAY_ADDRESS                the cluster's dashboard, http://HOST:8265
  RAY_AUTH_MODE=token        with RAY_AUTH_TOKEN_PATH=FILE, where the cluster asks for a token
  RAY_JOB_STOP_WAIT_TIME_S   seconds from SIGTERM to SIGKILL when the job is stopped (default 60)
  POLL_S                     seconds between two looks at the job (default 5)
  HF_HOME HF_HUB_OFFLINE OMP_NUM_THREADS
                             passed on to the job when set; nothing else of this environment is

exit codes: 0 succeeded, 2 bad usage, 3 failed, 5 cluster unreachable or refusing, 130 stopped
TEXT
}

say() { printf 'submit: %s\n' "$*" >&2; }
die() {
    local code=$1
    shift
    say "$*"
    exit "$code"
}

name=rl-edit
attempt=$(date -u +%Y%m%dT%H%M%S)
wait=yes
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --name | --attempt)
            [ $# -ge 2 ] || die 2 "$1 needs a value"
            if [ "$1" = --name ]; then name=$2; else attempt=$2; fi
            shift 2
            ;;
        --include | --limit)
            [ $# -ge 2 ] || die 2 "$1 needs a value"
            options+=("$1=$2")
            shift 2
            ;;
        --no-wait) wait=no && shift ;;
        -h | --help) usage && exit 0 ;;
        --) shift && break ;;
        *)
            die 2 "unknown argument '$1': what the job runs goes behind --," \
                "see deploy/submit.sh --help"
            ;;
    esac
done
[ $# -gt 0 ] || die 2 "nothing to run: give a verb behind --, e.g. -- train" \
    "--preset tiny-rc-grpo --run-dir /shared/runs/first"
job=$name-$attempt
[[ $job =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    die 2 "submission id '$job' may hold only letters, digits, dots, dashes and underscores"

# A relative run directory would lie in the job's temporary copy of the sources and vanish with it.
run_dir=
previous=
for argument in "$@"; do
    case $argument in --run-dir=*) run_dir=${argument#--run-dir=} ;; esac
    if [ "$previous" = --run-dir ]; then run_dir=$argument; fi
    previous=$argument
done
if [ "$1" = train ] && [[ $run_dir != /* ]]; then
    die 2 "train needs --run-dir with an absolute path that the cluster can write and you can" \
        "read, got '${run_dir:-none}'"
fi

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/ray ]; then PATH=$PWD/.venv/bin:$PATH; fi
if ! command -v ray >/dev/null || ! command -v python >/dev/null; then
    die 2 "the ray command is missing: run make setup first"
fi

address=${RAY_ADDRESS:-}
[ -n "$address" ] || die 2 "RAY_ADDRESS is not set: point it at the cluster's dashboard," \
    "e.g. RAY_ADDRESS=http://127.0.0.1:8265"
[[ $address =~ ^https?://[^/@]+/?$ ]] ||
    die 2 "RAY_ADDRESS must look like http://HOST:8265, the dashboard, without user, password or" \
        "path"
address=${address%/}

# Ray's own client waits for minutes on an address that swallows packets. This one gives up after
# five seconds.
python - "$address" <<'PROBE' || exit 5
import json
import os
import sys
import urllib.error
import urllib.request
from importlib.metadata import version

address = sys.argv[1]


def refuse(reason: str) -> None:
    sys.exit(f"submit: no job was submitted: {reason}")


try:
    with urllib.request.urlopen(f"{address}/api/version", timeout=5) as answer:
        cluster = json.loads(answer.read()).get("ray_version")
except urllib.error.HTTPError as error:
    if error.code not in (401, 403):
        refuse(f"{address} answered HTTP {error.code}; is this a Ray dashboard?")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        refuse(
            f"{address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the "
            "file that holds it"
        )
    cluster = None
except (OSError, ValueError) as error:
    reason = getattr(error, "reason", error)
    refuse(
        f"no Ray dashboard answers at {address} ({reason}): check RAY_ADDRESS, the port-forward or "
        "tunnel, and that the head runs"
    )
if cluster is not None and cluster != version("ray"):
    refuse(
        f"{address} runs Ray {cluster}, this environment has {version('ray')}: install the same "
        "version on both sides"
    )
PROBE

# Packed after the probe: a cluster that is not there is said first. Ray names a package by its
# content, so that the same files are uploaded once.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/job"
python -m rl_edit.jobs "$package/job" --here "$here" "${options[@]}" -- "$@" >"$package/words" ||
    exit 2
mapfile -d '' -t words <"$package/words"

# A whitelist: everything in a runtime environment can be read by whoever can list jobs.
environment=$(RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60} python - <<'ENVIRONMENT'
import json
import os

passed = ("RAY_JOB_STOP_WAIT_TIME_S", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
variables = {name: os.environ[name] for name in passed if name in os.environ}
print(json.dumps({"env_vars": {"RAY_USAGE_STATS_ENABLED": "0", **variables}}))
ENVIRONMENT
)

# A head answers some seconds before its job agent does, so that one refusal is waited out. Ray
# reports every refusal as a traceback of which the last line is the reason.
deadline=$((SECONDS + 120))
until refusal=$(ray job submit --address "$address" --submission-id "$job" \
    --working-dir "$package/job" --no-wait --runtime-env-json "$environment" \
    -- python -m rl_edit "${words[@]}" 2>&1 >/dev/null); do
    if [[ $refusal != *"No available agent"* ]] || [ "$SECONDS" -ge "$deadline" ]; then
        die 5 "the cluster at $address did not take $job: $(tail -n 1 <<<"$refusal")"
    fi
    sleep 2
done

rm -rf "$package"
say "submitted $job"
say "follow    ray job logs --address $address --follow $job"
say "stop      ray job stop --address $address $job"
if [ "$wait" = no ]; then exit 0; fi
trap 'say "no longer waiting; $job goes on"; exit 130' INT TERM

# The status is asked for, not read from a log tail: a tail that breaks would look like the end, and
# `ray job submit` without --no-wait counts a stopped job as a success.
python - "$address" "$job" "${POLL_S:-5}" <<'WAIT'
import sys
import time

from ray.job_submission import JobStatus, JobSubmissionClient

address, job, poll_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
UNREACHABLE_AFTER = 12
EXIT_CODES = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 3, JobStatus.STOPPED: 130}


def say(text: str) -> None:
    print(f"submit: {text}", file=sys.stderr, flush=True)


client = JobSubmissionClient(address)
seen, misses = None, 0
while True:
    try:
        status, misses = client.get_job_status(job), 0
    except Exception as error:  # the client raises whatever its HTTP library does
        misses += 1
        if misses == UNREACHABLE_AFTER:
            say(
                f"lost the cluster at {address} after {misses} tries "
                f"({type(error).__name__}: {error}); the job may still run"
            )
            sys.exit(5)
    else:
        if status != seen:
            say(f"{job} is {status.value}")
            seen = status
        if status.is_terminal():
            break
    time.sleep(poll_s)
try:
    sys.stdout.write(client.get_job_logs(job))
    sys.stdout.flush()
    info = client.get_job_info(job)
    if status != JobStatus.SUCCEEDED and info.message:
        say(" ".join(info.message.split())[:1000])
except Exception as error:  # the outcome is known; missing logs do not change it
    say(f"the logs of {job} could not be read ({type(error).__name__}: {error})")
sys.exit(EXIT_CODES[status])
WAIT
