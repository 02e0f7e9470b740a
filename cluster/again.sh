#!/usr/bin/env bash
# Runs a job again as long as it ends with 3 (interrupted, or the infrastructure failed), since it resumes then.
# Ends with the job's status. SIGTERM goes to the job, and is the end. Waits 30 s, then twice as long each time.
#   again.sh python jobs/label.py ...
set -u
delay=${AGAIN_DELAY_S:-30}
tries=10
stopped=
trap 'stopped=yes; kill -TERM "$job" 2>/dev/null' TERM INT

while :; do
    "$@" &
    job=$!
    # A signal ends the wait, not the job.
    while wait "$job"; status=$?; kill -0 "$job" 2>/dev/null; do :; done
    tries=$((tries - 1))
    if [ "$status" -ne 3 ] || [ -n "$stopped" ] || [ "$tries" -eq 0 ]; then
        exit "$status"
    fi
    echo "again.sh: ended with 3; again in $delay s, $tries tries left" >&2
    sleep "$delay" &
    job=$!
    wait "$job"
    [ -z "$stopped" ] || exit 3
    delay=$((delay < 300 ? 2 * delay : 600))
done
