/* Preloaded by tests (tests/python/faults.py): reads of a file, and threads, that fail when told to.
 *
 * Nothing of this is in the library: it calls pread, and the dynamic linker finds this one first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { NONE, FAIL, HALF, END, SLOW };

static char         part[1024]; /* of the path of a file that is meant */
static atomic_int   how = NONE;
static atomic_int   number; /* FAIL: errno. SLOW: milliseconds */
static atomic_long  to_skip, to_hit, n_hit;
static atomic_llong beyond; /* only reads that end after this offset */
static atomic_long  threads_left = -1;
static atomic_int   not_direct;

/* After `skip` reads of a file whose path contains `path` that end after offset `from`, the next `count` (-1: all) fail with errno
 * `value` (how 1), give half of what is asked for (2), say that the file is at its end (3), or take `value` milliseconds (4).
 * how 0 ends it. */
void faults_set(const char * path, int how_, int value, long long from, long skip, long count) {
    atomic_store(&how, NONE);
    snprintf(part, sizeof(part), "%s", path);
    atomic_store(&number, value);
    atomic_store(&beyond, from);
    atomic_store(&to_skip, skip);
    atomic_store(&to_hit, count < 0 ? LONG_MAX : count);
    atomic_store(&n_hit, 0);
    atomic_store(&how, how_);
}

/* Reads that were meddled with since faults_set. */
long faults_hits(void) { return atomic_load(&n_hit); }

/* After `n` more threads none can be started; -1: all can. */
void faults_threads(long n) { atomic_store(&threads_left, n); }

/* From now on no file has direct I/O, and O_DIRECT is taken all the same, as ext4 does with some files. */
void faults_not_direct(void) { atomic_store(&not_direct, 1); }

static int meddle(int fd, size_t bytes, long long offset) {
    const int what = atomic_load(&how);
    char      link[64], path[1024];
    if (what == NONE || offset + (long long) bytes <= atomic_load(&beyond)) {
        return NONE;
    }
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof(path) - 1);
    if (n < 0) {
        return NONE;
    }
    path[n] = '\0';
    if (strstr(path, part) == NULL || atomic_fetch_sub(&to_skip, 1) > 0) {
        return NONE;
    }
    if (atomic_fetch_sub(&to_hit, 1) <= 0) {
        return NONE;
    }
    atomic_fetch_add(&n_hit, 1);
    return what;
}

/* What the read becomes: its length, or -1 with *result set. */
static ssize_t changed(int fd, size_t bytes, long long offset, ssize_t * result) {
    switch (meddle(fd, bytes, offset)) {
        case FAIL:
            errno   = atomic_load(&number);
            *result = -1;
            return -1;
        case END:
            *result = 0;
            return -1;
        case HALF:
            return bytes >= 8192 ? (ssize_t) (bytes / 8192 * 4096) : (ssize_t) bytes;
        case SLOW: {
            const int             ms   = atomic_load(&number);
            const struct timespec wait = { ms / 1000, ms % 1000 * 1000000L };
            nanosleep(&wait, NULL);
            return (ssize_t) bytes;
        }
        default:
            return (ssize_t) bytes;
    }
}

typedef ssize_t (*pread_function)(int, void *, size_t, off_t);
typedef ssize_t (*read_function)(int, void *, size_t);
typedef int (*create_function)(pthread_t *, const pthread_attr_t *, void * (*) (void *), void *);

ssize_t pread(int fd, void * buffer, size_t bytes, off_t offset) {
    static _Atomic(pread_function) real;
    if (real == NULL) {
        real = (pread_function) dlsym(RTLD_NEXT, "pread");
    }
    ssize_t       result = 0;
    const ssize_t n      = changed(fd, bytes, offset, &result);
    return n < 0 ? result : real(fd, buffer, (size_t) n, offset);
}

ssize_t pread64(int fd, void * buffer, size_t bytes, off_t offset) { return pread(fd, buffer, bytes, offset); }

/* llama.cpp reads dense weights with this. */
ssize_t read(int fd, void * buffer, size_t bytes) {
    static _Atomic(read_function) real;
    if (real == NULL) {
        real = (read_function) dlsym(RTLD_NEXT, "read");
    }
    ssize_t       result = 0;
    const ssize_t n =
        atomic_load(&how) == NONE ? (ssize_t) bytes : changed(fd, bytes, (long long) lseek(fd, 0, SEEK_CUR), &result);
    return n < 0 ? result : real(fd, buffer, (size_t) n);
}

#ifdef STATX_DIOALIGN
typedef int (*statx_function)(int, const char *, int, unsigned, struct statx *);

int statx(int fd, const char * path, int flags, unsigned mask, struct statx * out) {
    static _Atomic(statx_function) real;
    if (real == NULL) {
        real = (statx_function) dlsym(RTLD_NEXT, "statx");
    }
    const int status = real(fd, path, flags, mask, out);
    if (status == 0 && (mask & STATX_DIOALIGN) != 0 && atomic_load(&not_direct)) {
        out->stx_mask |= STATX_DIOALIGN;
        out->stx_dio_offset_align = out->stx_dio_mem_align = 0;
    }
    return status;
}
#endif

int pthread_create(pthread_t * thread, const pthread_attr_t * attr, void * (*start)(void *), void * arg) {
    static _Atomic(create_function) real;
    if (real == NULL) {
        real = (create_function) dlsym(RTLD_NEXT, "pthread_create");
    }
    if (atomic_load(&threads_left) == 0) {
        return EAGAIN;
    }
    if (atomic_load(&threads_left) > 0) {
        atomic_fetch_sub(&threads_left, 1);
    }
    return real(thread, attr, start, arg);
}
