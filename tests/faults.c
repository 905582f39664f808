/* Preloaded into a process, it lets the nth call that changes a folder fail, or kills the process there.

   ENOSPC: a write stops half-way, and nothing more can be added from there on. EROFS: nothing more can be changed from
   there on. Any other error: this call alone fails. No error: SIGKILL, after half of a write. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int nth, error, calls;

void fault_arm(const char *in, int at, int with) {
    snprintf(folder, sizeof folder, "%s/", in);
    nth = at, error = with, calls = 0;
}

int fault_calls(void) { return calls; }

static int is_inside(int dir, const char *path) {
    char link[64], base[PATH_MAX] = "";
    if (!folder[0]) return 0;
    if (path && path[0] == '/') return !strncmp(path, folder, strlen(folder));
    if (dir == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t length = readlink(link, base, sizeof base - 2);
    if (length < 0) return 0;
    base[length] = '/';
    return !strncmp(base, folder, strlen(folder));
}

enum Change { ADDS, REMOVES };

/* Whether this call fails; it is the nth, or one that comes after. */
static int fails(int dir, const char *path, enum Change change) {
    if (!is_inside(dir, path)) return 0;
    ++calls;
    int now = calls == nth, after = nth && calls > nth;
    if (now && !error) kill(getpid(), SIGKILL);
    if (error == ENOSPC ? (now || after) && change == ADDS : error == EROFS ? now || after : now) {
        errno = error;
        return 1;
    }
    return 0;
}

/* Whether this write is the nth, and stops half-way rather than fails. */
static int is_cut(int fd, size_t size) {
    if ((error && error != ENOSPC) || size < 2 || calls + 1 != nth || !is_inside(fd, NULL)) return 0;
    ++calls;
    return 1;
}

static ssize_t cut(ssize_t written) {
    if (!error) kill(getpid(), SIGKILL);
    return written;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(result, name, parameters, arguments, dir, path, change) \
    result name parameters { return fails(dir, path, change) ? -1 : REAL(name) arguments; }

WRAP(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), fd, NULL, ADDS)
WRAP(ssize_t, copy_file_range, (int a, off64_t *i, int b, off64_t *j, size_t n, unsigned f), (a, i, b, j, n, f), b, NULL, ADDS)
WRAP(ssize_t, sendfile, (int b, int a, off_t *i, size_t n), (b, a, i, n), b, NULL, ADDS)
WRAP(ssize_t, sendfile64, (int b, int a, off64_t *i, size_t n), (b, a, i, n), b, NULL, ADDS)
WRAP(int, fsync, (int fd), (fd), fd, NULL, ADDS)
WRAP(int, fdatasync, (int fd), (fd), fd, NULL, ADDS)
WRAP(int, ftruncate, (int fd, off_t n), (fd, n), fd, NULL, ADDS)
WRAP(int, ftruncate64, (int fd, off64_t n), (fd, n), fd, NULL, ADDS)
WRAP(int, fallocate, (int fd, int m, off_t i, off_t n), (fd, m, i, n), fd, NULL, ADDS)
WRAP(int, fallocate64, (int fd, int m, off64_t i, off64_t n), (fd, m, i, n), fd, NULL, ADDS)
WRAP(int, rename, (const char *a, const char *b), (a, b), AT_FDCWD, b, REMOVES)
WRAP(int, renameat, (int x, const char *a, int y, const char *b), (x, a, y, b), y, b, REMOVES)
WRAP(int, unlink, (const char *a), (a), AT_FDCWD, a, REMOVES)
WRAP(int, unlinkat, (int d, const char *a, int f), (d, a, f), d, a, REMOVES)
WRAP(int, rmdir, (const char *a), (a), AT_FDCWD, a, REMOVES)
WRAP(int, mkdir, (const char *a, mode_t m), (a, m), AT_FDCWD, a, ADDS)
WRAP(int, mkdirat, (int d, const char *a, mode_t m), (d, a, m), d, a, ADDS)
WRAP(int, link, (const char *a, const char *b), (a, b), AT_FDCWD, b, ADDS)
WRAP(int, linkat, (int x, const char *a, int y, const char *b, int f), (x, a, y, b, f), y, b, ADDS)
WRAP(int, symlink, (const char *a, const char *b), (a, b), AT_FDCWD, b, ADDS)
WRAP(int, chmod, (const char *a, mode_t m), (a, m), AT_FDCWD, a, REMOVES)
WRAP(int, fchmod, (int fd, mode_t m), (fd, m), fd, NULL, REMOVES)
WRAP(int, fchmodat, (int d, const char *a, mode_t m, int f), (d, a, m, f), d, a, REMOVES)

ssize_t write(int fd, const void *data, size_t size) {
    if (is_cut(fd, size)) return cut(REAL(write)(fd, data, size / 2));
    return fails(fd, NULL, ADDS) ? -1 : REAL(write)(fd, data, size);
}

#define PWRITE(name, type)                                                            \
    ssize_t name(int fd, const void *data, size_t size, type at) {                    \
        if (is_cut(fd, size)) return cut(REAL(name)(fd, data, size / 2, at));         \
        return fails(fd, NULL, ADDS) ? -1 : REAL(name)(fd, data, size, at);           \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define OPENAT(name)                                                                  \
    int name(int dir, const char *path, int flags, ...) {                             \
        va_list more;                                                                 \
        va_start(more, flags);                                                        \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;       \
        va_end(more);                                                                 \
        if (flags & (O_CREAT | O_TRUNC) && fails(dir, path, ADDS)) return -1;         \
        return REAL(name)(dir, path, flags, mode);                                    \
    }
OPENAT(openat)
OPENAT(openat64)

#define OPEN(name)                                                                    \
    int name(const char *path, int flags, ...) {                                      \
        va_list more;                                                                 \
        va_start(more, flags);                                                        \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;       \
        va_end(more);                                                                 \
        if (flags & (O_CREAT | O_TRUNC) && fails(AT_FDCWD, path, ADDS)) return -1;    \
        return REAL(name)(path, flags, mode);                                         \
    }
OPEN(open)
OPEN(open64)

#define FOPEN(name)                                                                   \
    FILE *name(const char *path, const char *mode) {                                  \
        return mode[0] != 'r' && fails(AT_FDCWD, path, ADDS) ? NULL : REAL(name)(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)
