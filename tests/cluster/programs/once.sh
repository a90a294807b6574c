# shellcheck shell=bash
# Functions of the build scripts. Source it from the repository's root.

say() { echo "cluster: $*" >&2; }

# once DIRECTORY WHAT [--is-built]: makes the script build into the folder once. A complete folder has the file `complete`.
#
# With --is-built, ends the script: 0 if the folder is complete, else 1.
# Holds a lock until the script ends, so that one process builds at a time.
# If the folder is complete then, prints it and ends the script. Else creates it.
# Without Go, ends the script with an error.
once() {
    local directory=$1 what=$2
    [ "${3:-}" != --is-built ] || exec test -e "$directory/complete"
    mkdir -p .cache
    exec 9>"$directory.lock"
    flock 9
    if [ -e "$directory/complete" ]; then
        echo "$directory"
        exit
    fi
    command -v go >/dev/null || { say "needs Go to build $what (https://go.dev/dl)"; exit 1; }
    mkdir -p "$directory"
    say "building $what into $directory"
}
