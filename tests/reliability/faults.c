/* Makes system calls on paths below one folder fail on demand: preloaded into a process, told by faults_set.

   faults_watch(folder)                        watches this folder; an empty name watches nothing
   faults_set(call, errno, number, lasting)    the number-th such call from now on (1: the next) fails; lasting: and
                                               all that follow
   faults_count(call)                          how many such calls there were since faults_watch */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, CREATE, READ, WRITE, TRUNCATE, ALLOCATE, FSYNC, RENAME, MKDIR, UNLINK, LOCK, CALLS };
static const char *names[CALLS] = {"open",  "create", "read",  "write", "truncate", "allocate",
                                   "fsync", "rename", "mkdir", "unlink", "lock"};
static char watched[4096];
static size_t length;
static char inside[65536]; /* of each file descriptor: whether its file lies below the folder */
static long counts[CALLS];
static int failing = -1, error, lasting;
static long number;

static int which(const char *name) {
    for (int call = 0; call < CALLS; call++)
        if (!strcmp(name, names[call])) return call;
    return -1;
}

void faults_watch(const char *folder) {
    snprintf(watched, sizeof watched, "%s", folder);
    length = strlen(watched);
    failing = -1;
    if (!length) return;
    memset(counts, 0, sizeof counts);
    memset(inside, 0, sizeof inside);
}

void faults_set(const char *name, int value, long nth, int persistent) {
    failing = which(name);
    error = value;
    number = nth + (failing < 0 ? 0 : counts[failing]);
    lasting = persistent;
}

long faults_count(const char *name) {
    int call = which(name);
    return call < 0 ? -1 : counts[call];
}

/* Counts a call; whether it is to fail. */
static int fails(int call) {
    long now = __atomic_add_fetch(&counts[call], 1, __ATOMIC_SEQ_CST);
    int hit = call == failing && (lasting ? now >= number : now == number);
    /* a full disk takes no new files, blocks or lengths either */
    if (failing == WRITE && lasting && call != WRITE && counts[WRITE] + 1 >= number)
        hit = call == CREATE || call == ALLOCATE || call == TRUNCATE || call == MKDIR;
    if (hit) errno = error;
    return hit;
}

static int below(const char *path) {
    char whole[8192];
    if (!length || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, 4096)) return 0;
        strcat(whole, "/");
        strncat(whole, path, 4000);
        path = whole;
    }
    return !strncmp(path, watched, length) && (path[length] == '/' || !path[length]);
}

static int followed(int file) { return length && file >= 0 && file < (int)sizeof inside && inside[file]; }

static int follow(int file, int is_inside) {
    if (file >= 0 && file < (int)sizeof inside) inside[file] = is_inside;
    return file;
}

#define REAL(name)                                  \
    static __typeof__(name) *real;                  \
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)

#define OPENS(name)                                                               \
    int name(const char *path, int flags, ...) {                                  \
        REAL(name);                                                               \
        mode_t mode = 0;                                                          \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                    \
            va_list rest;                                                         \
            va_start(rest, flags);                                                \
            mode = va_arg(rest, mode_t);                                          \
            va_end(rest);                                                         \
        }                                                                         \
        int ours = below(path);                                                   \
        if (ours && fails(flags & O_CREAT ? CREATE : OPEN)) return -1;            \
        return follow(real(path, flags, mode), ours);                             \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                            \
    int name(int folder, const char *path, int flags, ...) {                      \
        REAL(name);                                                               \
        mode_t mode = 0;                                                          \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                    \
            va_list rest;                                                         \
            va_start(rest, flags);                                                \
            mode = va_arg(rest, mode_t);                                          \
            va_end(rest);                                                         \
        }                                                                         \
        int ours = path[0] == '/' || folder == AT_FDCWD ? below(path) : followed(folder); \
        if (ours && fails(flags & O_CREAT ? CREATE : OPEN)) return -1;            \
        return follow(real(folder, path, flags, mode), ours);                     \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define FOPENS(name)                                                              \
    FILE *name(const char *path, const char *mode) {                              \
        REAL(name);                                                               \
        int ours = below(path);                                                   \
        if (ours && fails(mode[0] == 'r' ? OPEN : CREATE)) return NULL;           \
        FILE *file = real(path, mode);                                            \
        if (file) follow(fileno(file), ours);                                     \
        return file;                                                              \
    }
FOPENS(fopen)
FOPENS(fopen64)

int close(int file) {
    REAL(close);
    follow(file, 0);
    return real(file);
}

#define FILE_CALL(kind, result, name, parameters, arguments, file) \
    result name parameters {                                       \
        REAL(name);                                                \
        if (followed(file) && fails(kind)) return -1;              \
        return real arguments;                                     \
    }
FILE_CALL(READ, ssize_t, read, (int file, void *to, size_t size), (file, to, size), file)
FILE_CALL(READ, ssize_t, pread, (int file, void *to, size_t size, off_t at), (file, to, size, at), file)
FILE_CALL(READ, ssize_t, pread64, (int file, void *to, size_t size, off64_t at), (file, to, size, at), file)
FILE_CALL(WRITE, ssize_t, write, (int file, const void *from, size_t size), (file, from, size), file)
FILE_CALL(WRITE, ssize_t, pwrite, (int file, const void *from, size_t size, off_t at), (file, from, size, at), file)
FILE_CALL(WRITE, ssize_t, pwrite64, (int file, const void *from, size_t size, off64_t at), (file, from, size, at), file)
FILE_CALL(WRITE, ssize_t, writev, (int file, const struct iovec *from, int size), (file, from, size), file)
FILE_CALL(WRITE, ssize_t, sendfile, (int to, int from, off_t *at, size_t size), (to, from, at, size), to)
FILE_CALL(WRITE, ssize_t, sendfile64, (int to, int from, off64_t *at, size_t size), (to, from, at, size), to)
FILE_CALL(WRITE, ssize_t, copy_file_range,
          (int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags),
          (from, at, to, there, size, flags), to)
FILE_CALL(TRUNCATE, int, ftruncate, (int file, off_t size), (file, size), file)
FILE_CALL(TRUNCATE, int, ftruncate64, (int file, off64_t size), (file, size), file)
FILE_CALL(ALLOCATE, int, fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size), file)
FILE_CALL(ALLOCATE, int, fallocate64, (int file, int mode, off64_t at, off64_t size), (file, mode, at, size), file)
FILE_CALL(FSYNC, int, fsync, (int file), (file), file)
FILE_CALL(FSYNC, int, fdatasync, (int file), (file), file)
FILE_CALL(LOCK, int, flock, (int file, int how), (file, how), file)

#define ALLOCATES(name, offset)                                       \
    int name(int file, offset at, offset size) {                      \
        REAL(name);                                                   \
        if (followed(file) && fails(ALLOCATE)) return error;          \
        return real(file, at, size);                                  \
    }
ALLOCATES(posix_fallocate, off_t)
ALLOCATES(posix_fallocate64, off64_t)

#define CONTROLS(name)                                                                                   \
    int name(int file, int what, ...) {                                                                  \
        REAL(name);                                                                                      \
        va_list rest;                                                                                    \
        va_start(rest, what);                                                                            \
        void *argument = va_arg(rest, void *);                                                           \
        va_end(rest);                                                                                    \
        int locks = what == F_SETLK || what == F_SETLKW || what == F_OFD_SETLK || what == F_OFD_SETLKW;  \
        if (locks && followed(file) && fails(LOCK)) return -1;                                           \
        int result = real(file, what, argument);                                                         \
        if (what == F_DUPFD || what == F_DUPFD_CLOEXEC) follow(result, followed(file));                  \
        return result;                                                                                   \
    }
CONTROLS(fcntl)
CONTROLS(fcntl64)

int dup(int file) {
    REAL(dup);
    return follow(real(file), followed(file));
}

#define PATH_CALL(kind, name, parameters, arguments, condition) \
    int name parameters {                                       \
        REAL(name);                                             \
        if ((condition) && fails(kind)) return -1;              \
        return real arguments;                                  \
    }
#define LIES(folder, path) ((path)[0] == '/' || (folder) == AT_FDCWD ? below(path) : followed(folder))
PATH_CALL(RENAME, rename, (const char *from, const char *to), (from, to), below(from) || below(to))
PATH_CALL(RENAME, renameat, (int folder, const char *from, int there, const char *to), (folder, from, there, to),
          LIES(folder, from) || LIES(there, to))
PATH_CALL(MKDIR, mkdir, (const char *path, mode_t mode), (path, mode), below(path))
PATH_CALL(MKDIR, mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), LIES(folder, path))
PATH_CALL(UNLINK, unlink, (const char *path), (path), below(path))
PATH_CALL(UNLINK, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), LIES(folder, path))
PATH_CALL(UNLINK, rmdir, (const char *path), (path), below(path))
