/* Stands between a process and its files: counts what changes a folder, and makes it fail there.

   Loaded with LD_PRELOAD; idle until `faulty_disk_arm` is called. Every operation below the root
   that succeeds, or fails by itself, is appended to a log outside it, one line each:
   number, name, result, size, path, second path, with tabs between. Of stdio only `fopen` and
   `fwrite` are seen, as NumPy uses them; writes through mappings and raw system calls are not. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SPARE_REMOVAL = 1, ONCE = 2, HALF = 4, READS = 8, TWICE = 16 };

static int armed;
static char root[PATH_MAX], below[PATH_MAX];
static int log_fd = -1;
static pid_t trainer;
static int fault_signal, fault_errno, fault_flags;
static long fault_at;
/* Shared with processes forked later: an operation has one number whoever does it. */
static volatile long *counts;

/* A fault begins at the operation `at` among those below `below`; 0 stands for none. */
int faulty_disk_arm(const char *root_path, const char *log_path, const char *below_path,
                    int signal_number, int error, int flags, long at)
{
    snprintf(root, sizeof root, "%s", root_path);
    snprintf(below, sizeof below, "%s", below_path);
    log_fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC,
                     0600);
    counts = mmap(NULL, 2 * sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                  0);
    trainer = getpid();
    fault_signal = signal_number;
    fault_errno = error;
    fault_flags = flags;
    fault_at = at;
    armed = log_fd >= 0 && counts != MAP_FAILED;
    return armed ? 0 : -1;
}

#define REAL(result, name, ...)                                                                  \
    static result (*real)(__VA_ARGS__);                                                          \
    if (!real)                                                                                   \
        real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int is_below(const char *path, const char *folder)
{
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0 && path[0] == '/' && !strstr(path, " (deleted)");
}

static int path_at(int folder, const char *name, char *path)
{
    char start[PATH_MAX] = "";
    if (!name)
        return 0;
    if (name[0] != '/' && !(folder == AT_FDCWD ? getcwd(start, sizeof start) != NULL
                                               : path_of(folder, start)))
        return 0;
    int size = snprintf(path, PATH_MAX, name[0] == '/' ? "%s%s" : "%s/%s", start, name);
    while (size > 1 && size < PATH_MAX && path[size - 1] == '/')
        path[--size] = 0;
    return 1;
}

typedef struct {
    const char *name;
    char path[PATH_MAX], target[PATH_MAX];
    long number, size;
    int hit, half;
} Operation;

static int may_fail(const char *name, int is_new)
{
    if (!(fault_flags & SPARE_REMOVAL))
        return 1;
    /* A full disk lets go of what is there, and opens what exists. */
    return strcmp(name, "unlink") && strcmp(name, "rmdir") && strcmp(name, "chmod") &&
           (strcmp(name, "open") || is_new);
}

/* Counts an operation and tells whether it is to fail; at SIGKILL it does not come back. */
static int begin(Operation *operation, const char *name, int is_new)
{
    operation->name = name;
    operation->hit = operation->half = 0;
    if (!armed || !is_below(operation->path, root))
        return operation->number = 0;
    operation->number = __sync_add_and_fetch(&counts[0], 1);
    if (!fault_at || (fault_flags & READS) ||
        !(is_below(operation->path, below) || is_below(operation->target, below)))
        return 0;
    long number = __sync_add_and_fetch(&counts[1], 1);
    int again = (fault_flags & TWICE) && number == fault_at + 1;
    if (fault_signal && (number == fault_at || again)) {
        if (fault_signal != SIGKILL)
            kill(trainer, fault_signal);
        else if (!strcmp(name, "write"))
            operation->half = 1;
        else {
            kill(trainer, SIGKILL);
            raise(SIGKILL);
        }
    }
    /* That a folder is there already is said before anything else. */
    int is_there = !strcmp(name, "mkdir") && !access(operation->path, F_OK);
    if (fault_errno && number >= fault_at && !is_there && may_fail(name, is_new)) {
        if (number == fault_at && (fault_flags & HALF) && !strcmp(name, "write"))
            return operation->half = 1, 0;
        if (!(fault_flags & ONCE) || number <= fault_at + (fault_flags & HALF ? 1 : 0))
            return operation->hit = 1;
    }
    return 0;
}

static void end(Operation *operation, long result, long size)
{
    if (!operation->number)
        return;
    int kept = errno;
    char line[2 * PATH_MAX + 128];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%d\t%ld\t%s\t%s\n", operation->number,
                          operation->name, result < 0 ? kept : 0, size, operation->path,
                          operation->target);
    syscall(SYS_write, log_fd, line, length);
    if (operation->half && fault_signal == SIGKILL) {
        kill(trainer, SIGKILL);
        raise(SIGKILL);
    }
    errno = kept;
}

/* What most operations look like: fail, or do the real thing and log it. */
#define DO(operation, call)                                                                      \
    do {                                                                                         \
        long result = -1;                                                                        \
        if ((operation).hit)                                                                     \
            errno = fault_errno;                                                                 \
        else                                                                                     \
            result = (call);                                                                     \
        end(&(operation), result, (operation).size);                                                            \
        return result;                                                                           \
    } while (0)

static int opening(Operation *operation, int folder, const char *name, int writes, int cuts)
{
    operation->target[0] = operation->path[0] = 0;
    operation->number = operation->size = operation->hit = operation->half = 0;
    if (!armed || !writes || !path_at(folder, name, operation->path))
        return 0;
    struct stat facts;
    int is_new = syscall(SYS_newfstatat, AT_FDCWD, operation->path, &facts, 0) < 0;
    operation->size = is_new || cuts ? 0 : facts.st_size;
    begin(operation, is_new || cuts ? "open" : "append", is_new);
    return 1;
}

#define OPENS(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define MODE(flags, last)                                                                        \
    mode_t mode = 0;                                                                             \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                       \
        va_list rest;                                                                            \
        va_start(rest, last);                                                                    \
        mode = va_arg(rest, mode_t);                                                             \
        va_end(rest);                                                                            \
    }

#define OPEN(function)                                                                           \
    int function(const char *name, int flags, ...)                                               \
    {                                                                                            \
        REAL(int, #function, const char *, int, ...);                                            \
        MODE(flags, flags);                                                                      \
        Operation it;                                                                            \
        opening(&it, AT_FDCWD, name, OPENS(flags), flags & O_TRUNC);                             \
        DO(it, real(name, flags, mode));                                                         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                                         \
    int function(int folder, const char *name, int flags, ...)                                   \
    {                                                                                            \
        REAL(int, #function, int, const char *, int, ...);                                       \
        MODE(flags, flags);                                                                      \
        Operation it;                                                                            \
        opening(&it, folder, name, OPENS(flags), flags & O_TRUNC);                               \
        DO(it, real(folder, name, flags, mode));                                                 \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(function)                                                                          \
    FILE *function(const char *name, const char *mode)                                           \
    {                                                                                            \
        REAL(FILE *, #function, const char *, const char *);                                     \
        Operation it;                                                                            \
        opening(&it, AT_FDCWD, name, strpbrk(mode, "wa+") != NULL, mode[0] == 'w');              \
        if (it.hit)                                                                              \
            errno = fault_errno;                                                                 \
        FILE *file = it.hit ? NULL : real(name, mode);                                           \
        end(&it, file ? 0 : -1, it.size);                                                              \
        return file;                                                                             \
    }
FOPEN(fopen)
FOPEN(fopen64)

static void of_file(Operation *operation, int fd, const char *name)
{
    operation->target[0] = operation->path[0] = 0;
    operation->number = operation->size = operation->hit = operation->half = 0;
    if (armed && path_of(fd, operation->path))
        begin(operation, name, 0);
}

#define WRITE(size, call)                                                                        \
    do {                                                                                         \
        Operation it;                                                                            \
        of_file(&it, fd, "write");                                                               \
        size_t all = (size), part = it.half ? all / 2 : all;                                     \
        ssize_t result = -1;                                                                     \
        if (it.hit || (it.half && !part && fault_signal != SIGKILL))                             \
            errno = fault_errno;                                                                 \
        else                                                                                     \
            result = (call);                                                                     \
        end(&it, result, result < 0 ? 0 : result);                                               \
        return result;                                                                           \
    } while (0)

ssize_t write(int fd, const void *content, size_t size)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    WRITE(size, real(fd, content, part));
}

size_t fwrite(const void *content, size_t size, size_t number, FILE *file)
{
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *);
    Operation it;
    of_file(&it, fileno(file), "write");
    if (!it.number)
        return real(content, size, number, file);
    size_t all = size * number, part = it.half ? all / 2 : all;
    long result = -1;
    if (!it.hit) {
        result = real(content, 1, part, file);
        fflush(file);
    }
    end(&it, result, result < 0 ? 0 : result);
    if (it.hit || it.half)
        errno = fault_errno;
    return result <= 0 ? 0 : (size_t)result == all ? number : result / size;
}

#define PWRITE(function)                                                                         \
    ssize_t function(int fd, const void *content, size_t size, off_t place)                      \
    {                                                                                            \
        REAL(ssize_t, #function, int, const void *, size_t, off_t);                              \
        WRITE(size, real(fd, content, part, place));                                             \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    /* Of several parts the first alone is what comes through by half. */
    WRITE(count ? parts[0].iov_len : 0,
          it.half ? syscall(SYS_write, fd, parts[0].iov_base, part) : real(fd, parts, count));
}

#define SENDFILE(function)                                                                       \
    ssize_t function(int fd, int from, off_t *place, size_t size)                                \
    {                                                                                            \
        REAL(ssize_t, #function, int, int, off_t *, size_t);                                     \
        WRITE(size, real(fd, from, place, part));                                                \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int from, off64_t *from_place, int fd, off64_t *place, size_t size,
                        unsigned flags)
{
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    WRITE(size, real(from, from_place, fd, place, part, flags));
}

ssize_t read(int fd, void *content, size_t size)
{
    REAL(ssize_t, "read", int, void *, size_t);
    char path[PATH_MAX];
    if (armed && (fault_flags & READS) && path_of(fd, path) && is_below(path, below)) {
        errno = fault_errno;
        return -1;
    }
    return real(fd, content, size);
}

#define ON_FILE(function, label)                                                                 \
    int function(int fd)                                                                         \
    {                                                                                            \
        REAL(int, #function, int);                                                               \
        Operation it;                                                                            \
        of_file(&it, fd, label);                                                                 \
        DO(it, real(fd));                                                                        \
    }
ON_FILE(fsync, "fsync")
ON_FILE(fdatasync, "fsync")

#define FTRUNCATE(function)                                                                      \
    int function(int fd, off_t size)                                                             \
    {                                                                                            \
        REAL(int, #function, int, off_t);                                                        \
        Operation it;                                                                            \
        of_file(&it, fd, "truncate");                                                            \
        long result = it.hit ? (errno = fault_errno, -1) : real(fd, size);                       \
        end(&it, result, size);                                                                  \
        return result;                                                                           \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

int fchmod(int fd, mode_t mode)
{
    REAL(int, "fchmod", int, mode_t);
    Operation it;
    of_file(&it, fd, "chmod");
    DO(it, real(fd, mode));
}

static void of_path(Operation *operation, int folder, const char *path, const char *name)
{
    operation->target[0] = operation->path[0] = 0;
    operation->number = operation->size = operation->hit = operation->half = 0;
    if (armed && path_at(folder, path, operation->path))
        begin(operation, name, 0);
}

static void of_paths(Operation *operation, int folder, const char *path, int other_folder,
                     const char *other, const char *name)
{
    operation->path[0] = 0;
    operation->number = operation->size = operation->hit = operation->half = 0;
    if (armed && path_at(folder, path, operation->path) &&
        path_at(other_folder, other, operation->target))
        begin(operation, name, 0);
}

#define ON_PATH(label, function, parameters, types, folder, call)                                \
    int function parameters                                                                      \
    {                                                                                            \
        REAL(int, #function, types);                                                             \
        Operation it;                                                                            \
        of_path(&it, folder, path, label);                                                       \
        DO(it, real call);                                                                       \
    }
#define _(...) __VA_ARGS__
ON_PATH("unlink", unlink, (const char *path), _(const char *), AT_FDCWD, (path))
ON_PATH("rmdir", rmdir, (const char *path), _(const char *), AT_FDCWD, (path))
ON_PATH("mkdir", mkdir, (const char *path, mode_t mode), _(const char *, mode_t), AT_FDCWD,
        (path, mode))
ON_PATH("mkdir", mkdirat, (int folder, const char *path, mode_t mode),
        _(int, const char *, mode_t), folder, (folder, path, mode))
ON_PATH("chmod", chmod, (const char *path, mode_t mode), _(const char *, mode_t), AT_FDCWD,
        (path, mode))
ON_PATH("chmod", fchmodat, (int folder, const char *path, mode_t mode, int flags),
        _(int, const char *, mode_t, int), folder, (folder, path, mode, flags))
ON_PATH(flags & AT_REMOVEDIR ? "rmdir" : "unlink", unlinkat,
        (int folder, const char *path, int flags), _(int, const char *, int), folder,
        (folder, path, flags))

#define CUT(function)                                                                            \
    int function(const char *path, off_t size)                                                   \
    {                                                                                            \
        REAL(int, #function, const char *, off_t);                                               \
        Operation it;                                                                            \
        of_path(&it, AT_FDCWD, path, "truncate");                                                \
        long result = it.hit ? (errno = fault_errno, -1) : real(path, size);                     \
        end(&it, result, size);                                                                  \
        return result;                                                                           \
    }
CUT(truncate)
CUT(truncate64)

#define ON_PATHS(label, function, parameters, types, folder, other_folder, call)                 \
    int function parameters                                                                      \
    {                                                                                            \
        REAL(int, #function, types);                                                             \
        Operation it;                                                                            \
        of_paths(&it, folder, path, other_folder, other, label);                                 \
        DO(it, real call);                                                                       \
    }
ON_PATHS("rename", rename, (const char *path, const char *other), _(const char *, const char *),
         AT_FDCWD, AT_FDCWD, (path, other))
ON_PATHS("rename", renameat, (int folder, const char *path, int there, const char *other),
         _(int, const char *, int, const char *), folder, there, (folder, path, there, other))
ON_PATHS("rename", renameat2,
         (int folder, const char *path, int there, const char *other, unsigned flags),
         _(int, const char *, int, const char *, unsigned), folder, there,
         (folder, path, there, other, flags))
ON_PATHS("link", link, (const char *path, const char *other), _(const char *, const char *),
         AT_FDCWD, AT_FDCWD, (path, other))
ON_PATHS("link", linkat,
         (int folder, const char *path, int there, const char *other, int flags),
         _(int, const char *, int, const char *, int), folder, there,
         (folder, path, there, other, flags))
