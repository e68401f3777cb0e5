// Counts the calls by which a process renames, flushes and removes files below one directory, and kills the process
// just before the one that was asked for. Loaded by LD_PRELOAD; forked processes share nothing, so each counts its own.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char below[PATH_MAX];
static long deadly, count;
static int log_file = -1;

// From now on, counts the calls below `directory`, and kills before the call number `at`; 0 kills never.
// Each call becomes a line of the file `log`.
void karat_faults_arm(const char* directory, long at, const char* log) {
  snprintf(below, sizeof below, "%s", directory);
  deadly = at;
  count = 0;
  log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

// The path of an open file, or of a name in an open directory.
static void find(int file, const char* name, char* path) {
  char link[64];
  ssize_t length = 0;
  path[0] = 0;
  if (name == NULL || (name[0] != '/' && file != AT_FDCWD)) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) length = 0;
    path[length] = 0;
  }
  if (name != NULL) snprintf(path + length, PATH_MAX - (size_t)length, "%s%s", length ? "/" : "", name);
}

static void note(const char* call, int file, const char* name) {
  if (!below[0]) return;
  char path[2 * PATH_MAX], line[2 * PATH_MAX + 64];
  find(file, name, path);
  if (strncmp(path, below, strlen(below)) != 0) return;
  const long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  const int length = snprintf(line, sizeof line, "%ld %s %s\n", number, call, path + strlen(below));
  if (log_file >= 0 && write(log_file, line, (size_t)length) < 0) return;
  if (number == deadly) kill(getpid(), SIGKILL);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int rename(const char* from, const char* to) {
  note("rename", AT_FDCWD, to);
  return NEXT(rename)(from, to);
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) {
  note("rename", to_directory, to);
  return NEXT(renameat)(from_directory, from, to_directory, to);
}

int unlink(const char* path) {
  note("unlink", AT_FDCWD, path);
  return NEXT(unlink)(path);
}

int unlinkat(int directory, const char* name, int flags) {
  note("unlink", directory, name);
  return NEXT(unlinkat)(directory, name, flags);
}

int rmdir(const char* path) {
  note("rmdir", AT_FDCWD, path);
  return NEXT(rmdir)(path);
}

int fsync(int file) {
  note("fsync", file, NULL);
  return NEXT(fsync)(file);
}

int fdatasync(int file) {
  note("fsync", file, NULL);
  return NEXT(fdatasync)(file);
}
