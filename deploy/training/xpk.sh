#!/usr/bin/env bash
# The same run by XPK, which writes the PathwaysJob itself: deploy/training/xpk.sh RUN.toml DIR
# The file's path is the one inside the image. v5p is counted in cores: 6,144 chips are v5p-12288.
set -euo pipefail

run=${1:?usage: xpk.sh RUN.toml DIR} out=${2:?name the folder of the run, on a mounted bucket}
: "${CLUSTER:?set CLUSTER to the GKE cluster that xpk made}" "${IMAGE:?set IMAGE to a container image with gemcut}"

exec xpk workload create-pathways \
  --cluster "$CLUSTER" \
  --workload "gemcut-$(date +%m%d-%H%M)" \
  --tpu-type "${TPU_TYPE:-v5p-12288}" \
  --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts 10 \
  --command "gemcut train run $(printf %q "$run") $(printf %q "$out") --resume"
