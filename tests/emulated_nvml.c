// NVIDIA's libnvidia-ml.so.1 for tests, as nvidia-ml-py calls it: a node with two GPUs. The second has the fault that
// the variable NVML_FAULT names, if NVML_NODE is this node or is not set.
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, LINKS = 4 };
typedef char *Gpu;
static char gpus[2];

static int has(Gpu gpu, const char *fault) {
  const char *named = getenv("NVML_FAULT"), *where = getenv("NVML_NODE"), *here = getenv("SLURMD_NODENAME");
  if (gpu != &gpus[1] || !named || strcmp(named, fault)) return 0;
  return !where || (here && !strcmp(where, here));
}

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 2, SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned number, Gpu *gpu) { return *gpu = &gpus[number], SUCCESS; }

int nvmlDeviceGetTotalEccErrors(Gpu gpu, int kind, int since, unsigned long long *count) {
  if (has(gpu, "everything unknown")) return NOT_SUPPORTED;
  return *count = kind == 1 && since == 0 && has(gpu, "ecc") ? 7 : 0, SUCCESS;
}

int nvmlDeviceGetRemappedRows(Gpu gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
  if (has(gpu, "everything unknown")) return NOT_SUPPORTED;
  *corrected = *uncorrected = 2;  // rows that were replaced do no harm
  return *pending = has(gpu, "pending"), *failed = has(gpu, "no row"), SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Gpu gpu, unsigned long long *reasons) {
  if (has(gpu, "everything unknown")) return NOT_SUPPORTED;
  // 1: the GPU is idle. 4: it is at the power that it may take. 8 and 32: the hardware or the driver slows it down.
  return *reasons = 1 | 4 | (has(gpu, "slowdown") ? 8 : 0) | (has(gpu, "heat") ? 32 : 0), SUCCESS;
}

int nvmlDeviceGetCurrPcieLinkWidth(Gpu gpu, unsigned *lanes) {
  if (has(gpu, "everything unknown")) return NOT_SUPPORTED;
  return *lanes = has(gpu, "lanes") ? 8 : 16, SUCCESS;
}

int nvmlDeviceGetMaxPcieLinkWidth(Gpu gpu, unsigned *lanes) { return *lanes = 16, SUCCESS; }

int nvmlDeviceGetNvLinkState(Gpu gpu, unsigned link, unsigned *active) {
  if (link >= LINKS || has(gpu, "everything unknown")) return NOT_SUPPORTED;
  return *active = !has(gpu, "no links") && !(link == 1 && has(gpu, "link")), SUCCESS;
}
