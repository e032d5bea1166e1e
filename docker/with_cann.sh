#!/usr/bin/env bash
# Run a command in the environment of the CANN toolkit and then of nnal, which does not find its libraries the other way round.
set -eo pipefail
source /usr/local/Ascend/ascend-toolkit/set_env.sh
source /usr/local/Ascend/nnal/atb/set_env.sh
exec "$@"
