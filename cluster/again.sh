#!/usr/bin/env bash
# Runs a job again as long as it ends with 3 (interrupted, or the infrastructure failed), since it resumes then.
# Ends with the job's status. SIGTERM goes to the job, and is the end. Waits 30 s, then twice as long each time.
#   again.sh python jobs/label.py ...
set -uo pipefail # without -e: a status is what this is about
delay=${AGAIN_DELAY_S:-30}
tries=10
stopped=
child= # the job, or the pause between two of them

stop() {
    stopped=yes
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}

# Starts a command, and waits for its end: a signal ends the wait, not the command. Leaves its status in $status.
run() {
    "$@" &
    child=$!
    [ -z "$stopped" ] || stop # told between the check and the start
    while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
    wait "$child" # once more: it may have ended while the signal was handled
    status=$?
    case $status in
        # SIGTERM came when it had no ear for it yet, or any more; or memory was short and it was killed.
        143 | 137) status=3 ;;
    esac
}

trap stop TERM INT
while [ -z "$stopped" ]; do
    run "$@"
    tries=$((tries - 1))
    if [ "$status" -ne 3 ] || [ -n "$stopped" ] || [ "$tries" -eq 0 ]; then
        exit "$status"
    fi
    echo "again.sh: ended with 3; again in $delay s, $tries tries left" >&2
    run sleep "$delay"
    delay=$((delay < 300 ? 2 * delay : 600))
done
exit 3
