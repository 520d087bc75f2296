/*
 * bench_floors.c: what this machine can do at best, as bare C without a broker. tools/bench_floors.py builds it with the
 * system's compiler and runs it between the broker's own figures, so that both see the same minute of a noisy machine.
 *
 *   append   BODY BATCH COUNT RING         records into a ring in memory: robust lock, CRC-32C, copy, one store of tail
 *   prepare  PATH BYTES                    make a zero-filled, synced file for the next two
 *   write    PATH PIECE COUNT RING         pwrite + fdatasync of consecutive pieces of a ring in memory; begins again at
 *                                          the ring's and at the file's end
 *   handover PATH BODY PRODUCERS SECONDS   producers append and wait; one flusher process writes, syncs and wakes them
 *   one_way  RATE COUNT SPIN APART         a stamp handed to another process, which sleeps on a semaphore (or spins); two
 *                                          processes on one core hand over faster than two on two cores: APART is the latter
 *
 * Each prints one JSON object. Times are nanoseconds of CLOCK_MONOTONIC.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { HEADER_BYTES = 80, ALIGN_BYTES = 8, PRODUCERS_MAX = 64, SAMPLES_MAX = 1 << 20 };

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void sleep_until(int64_t when_ns) {
    struct timespec t = {.tv_sec = when_ns / 1000000000, .tv_nsec = when_ns % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {
    }
}

static void *shared(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (p == MAP_FAILED) {
        fail("mmap");
    }
    return p;
}

static pid_t child(void) {
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid < 0) {
        fail("fork");
    }
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* Ctrl-C at the parent ends the children too */
        if (getppid() != parent) {
            _exit(1);
        }
    }
    return pid;
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void print_latencies(int64_t *samples, size_t count) {
    qsort(samples, count, sizeof *samples, compare);
    printf("\"samples\": %zu, \"p50_ns\": %lld, \"p99_ns\": %lld", count, (long long)samples[count / 2],
           (long long)samples[count * 99 / 100]);
}

/* ---- append ------------------------------------------------------------------------------------------------------ */

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc32c(const uint8_t *data, size_t bytes) {
    uint64_t crc = 0xffffffffu;
    for (; bytes >= 8; data += 8, bytes -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        crc = __builtin_ia32_crc32di(crc, word);
    }
    for (; bytes; data++, bytes--) {
        crc = __builtin_ia32_crc32qi((uint32_t)crc, *data);
    }
    return ~(uint32_t)crc;
}
#elif defined(__aarch64__)
#include <arm_acle.h>
__attribute__((target("+crc"))) static uint32_t crc32c(const uint8_t *data, size_t bytes) {
    uint32_t crc = 0xffffffffu;
    for (; bytes >= 8; data += 8, bytes -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        crc = __crc32cd(crc, word);
    }
    for (; bytes; data++, bytes--) {
        crc = __crc32cb(crc, *data);
    }
    return ~crc;
}
#else
static uint32_t crc32c(const uint8_t *data, size_t bytes) {
    uint32_t crc = 0xffffffffu;
    for (; bytes; data++, bytes--) {
        crc ^= *data;
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1u)));
        }
    }
    return ~crc;
}
#endif

typedef struct {
    pthread_mutex_t lock; /* robust, process-shared: a floor that a killed process cannot hang */
    _Alignas(128) _Atomic uint64_t tail;
    _Atomic uint64_t open_batch; /* under the lock: the flush that will cover what is appended now */
    _Alignas(128) _Atomic uint64_t flushed;
    _Alignas(128) _Atomic uint32_t flusher_asleep;
    _Alignas(128) _Atomic uint32_t done[2]; /* counts the flushes of even and of odd batches: waited on by futex */
    _Atomic uint32_t go, stop, producers_gone; /* the flusher leaves last: nobody may wait for it in vain */
    uint64_t ring_bytes, record_bytes;
    uint8_t *ring;
} floor_log;

static floor_log *make_log(uint64_t body_bytes, uint64_t ring_bytes) {
    floor_log *log = shared(sizeof *log);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&log->lock, &attributes);
    log->record_bytes = (HEADER_BYTES + body_bytes + ALIGN_BYTES - 1) & ~(uint64_t)(ALIGN_BYTES - 1);
    log->ring_bytes = ring_bytes / log->record_bytes * log->record_bytes; /* no record crosses the end */
    log->ring = shared(log->ring_bytes);
    return log;
}

/* Append `count` records of this body under one lock; returns the end of the last and the batch it belongs to. */
static uint64_t append(floor_log *log, const uint8_t *body, uint64_t body_bytes, int count, uint64_t *batch) {
    uint32_t crc[1024];
    for (int i = 0; i < count; i++) {
        crc[i] = crc32c(body, body_bytes);
    }
    if (pthread_mutex_lock(&log->lock) == EOWNERDEAD) {
        pthread_mutex_consistent(&log->lock);
    }
    uint64_t tail = atomic_load_explicit(&log->tail, memory_order_relaxed);
    for (int i = 0; i < count; i++) {
        uint64_t header[HEADER_BYTES / 8] = {log->record_bytes, crc[i], tail, body_bytes};
        header[1] ^= crc32c((const uint8_t *)&header[2], HEADER_BYTES - 16);
        uint8_t *place = log->ring + tail % log->ring_bytes;
        memcpy(place, header, HEADER_BYTES);
        memcpy(place + HEADER_BYTES, body, body_bytes);
        tail += log->record_bytes;
    }
    *batch = atomic_load_explicit(&log->open_batch, memory_order_relaxed);
    atomic_store_explicit(&log->tail, tail, memory_order_release);
    pthread_mutex_unlock(&log->lock);
    return tail;
}

static void run_append(char **argument) {
    uint64_t body_bytes = strtoull(argument[0], NULL, 10), count = strtoull(argument[2], NULL, 10), batch;
    int size = atoi(argument[1]);
    floor_log *log = make_log(body_bytes, strtoull(argument[3], NULL, 10));
    uint8_t *body = calloc(1, body_bytes + 1);
    int64_t begin = now_ns();
    for (uint64_t i = 0; i < count; i += (uint64_t)size) {
        body[0] = (uint8_t)i;
        append(log, body, body_bytes, size, &batch);
    }
    printf("{\"elapsed_ns\": %lld}\n", (long long)(now_ns() - begin));
}

/* ---- files ------------------------------------------------------------------------------------------------------- */

static void run_prepare(char **argument) {
    uint64_t bytes = strtoull(argument[1], NULL, 10);
    uint8_t *zeros = calloc(1, 1 << 20);
    int file = open(argument[0], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0) {
        fail(argument[0]);
    }
    for (uint64_t at = 0; at < bytes; at += 1 << 20) {
        uint64_t piece = bytes - at < 1 << 20 ? bytes - at : 1 << 20;
        if (pwrite(file, zeros, piece, (off_t)at) != (ssize_t)piece) {
            fail("pwrite");
        }
    }
    if (fsync(file) != 0) {
        fail("fsync");
    }
    printf("{}\n");
}

static void run_write(char **argument) {
    uint64_t piece = strtoull(argument[1], NULL, 10), count = strtoull(argument[2], NULL, 10);
    uint64_t ring_pieces = strtoull(argument[3], NULL, 10) / piece;
    int64_t *samples = calloc(count, sizeof *samples);
    uint64_t *data = shared(piece * ring_pieces);
    struct stat about;
    int file = open(argument[0], O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &about) != 0) {
        fail(argument[0]);
    }
    uint64_t pieces = (uint64_t)about.st_size / piece;
    for (uint64_t i = 0; i < piece * ring_pieces / sizeof *data; i++) {
        data[i] = i * 0x9e3779b97f4a7c15ull;
    }
    int64_t begin = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        int64_t start = now_ns();
        const uint64_t *source = data + i % ring_pieces * piece / sizeof *data;
        if (pwrite(file, source, piece, (off_t)(i % pieces * piece)) != (ssize_t)piece || fdatasync(file) != 0) {
            fail("pwrite, fdatasync");
        }
        samples[i] = now_ns() - start;
    }
    printf("{\"elapsed_ns\": %lld, ", (long long)(now_ns() - begin));
    print_latencies(samples, count);
    printf("}\n");
}

/* ---- hand-over to a flusher process ------------------------------------------------------------------------------ */

static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

/* Group commit: whatever has been appended when a flush begins is one batch; its waiters are woken by one call. */
static void flusher(floor_log *log, int file) {
    uint64_t flushed = 0;
    for (;;) {
        while (atomic_load(&log->tail) == flushed) {
            if (atomic_load(&log->producers_gone)) {
                return;
            }
            atomic_store(&log->flusher_asleep, 1);
            if (atomic_load(&log->tail) == flushed && !atomic_load(&log->producers_gone)) {
                futex_wait(&log->flusher_asleep, 1);
            }
            atomic_store(&log->flusher_asleep, 0);
        }
        pthread_mutex_lock(&log->lock);
        uint64_t batch = atomic_fetch_add(&log->open_batch, 1);
        uint64_t tail = atomic_load(&log->tail);
        pthread_mutex_unlock(&log->lock);
        while (flushed < tail) {
            uint64_t at = flushed % log->ring_bytes;
            uint64_t piece = tail - flushed < log->ring_bytes - at ? tail - flushed : log->ring_bytes - at;
            if (pwrite(file, log->ring + at, piece, (off_t)at) != (ssize_t)piece) {
                fail("pwrite");
            }
            flushed += piece;
        }
        if (fdatasync(file) != 0) {
            fail("fdatasync");
        }
        atomic_store(&log->flushed, flushed);
        atomic_fetch_add(&log->done[batch & 1], 1);
        futex_wake(&log->done[batch & 1]);
    }
}

static void producer(floor_log *log, uint64_t body_bytes, int64_t *samples, _Atomic uint64_t *count) {
    uint8_t *body = calloc(1, body_bytes + 1);
    while (!atomic_load(&log->go)) {
        futex_wait(&log->go, 0);
    }
    for (uint64_t i = 0; i < SAMPLES_MAX && !atomic_load(&log->stop); i++) {
        uint64_t batch;
        int64_t begin = now_ns();
        body[0] = (uint8_t)i;
        uint64_t end = append(log, body, body_bytes, 1, &batch);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load(&log->flusher_asleep) && atomic_exchange(&log->flusher_asleep, 0)) {
            futex_wake(&log->flusher_asleep);
        }
        for (;;) {
            uint32_t seen = atomic_load(&log->done[batch & 1]);
            if (atomic_load(&log->flushed) >= end) {
                break;
            }
            futex_wait(&log->done[batch & 1], seen);
        }
        samples[i] = now_ns() - begin;
        atomic_store(count, i + 1);
    }
}

static void run_handover(char **argument) {
    uint64_t body_bytes = strtoull(argument[1], NULL, 10);
    int producers = atoi(argument[2]), file = open(argument[0], O_RDWR | O_CLOEXEC);
    int64_t length_ns = (int64_t)(atof(argument[3]) * 1e9);
    struct stat about;
    if (file < 0 || fstat(file, &about) != 0 || producers < 1 || producers > PRODUCERS_MAX) {
        fail(argument[0]);
    }
    floor_log *log = make_log(body_bytes, (uint64_t)about.st_size);
    _Atomic uint64_t *counts = shared(sizeof *counts * PRODUCERS_MAX);
    int64_t *samples = mmap(NULL, sizeof *samples * SAMPLES_MAX * (size_t)producers, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (samples == MAP_FAILED) {
        fail("mmap");
    }
    pid_t flusher_pid = child();
    if (flusher_pid == 0) {
        flusher(log, file);
        _exit(0);
    }
    for (int i = 0; i < producers; i++) {
        if (child() == 0) {
            producer(log, body_bytes, samples + (size_t)i * SAMPLES_MAX, &counts[i]);
            _exit(0);
        }
    }
    int64_t begin = now_ns();
    atomic_store(&log->go, 1);
    futex_wake(&log->go);
    sleep_until(begin + length_ns);
    uint64_t total = 0;
    for (int i = 0; i < producers; i++) {
        total += atomic_load(&counts[i]);
    }
    int64_t elapsed = now_ns() - begin;
    atomic_store(&log->stop, 1);
    for (int i = 0; i < producers; i++) {
        wait(NULL);
    }
    atomic_store(&log->producers_gone, 1);
    atomic_store(&log->flusher_asleep, 0); /* also if it is just about to sleep: the value it waits for has gone */
    futex_wake(&log->flusher_asleep);
    wait(NULL);
    size_t count = 0;
    for (int i = 0; i < producers; i++) { /* pack, then sort as one */
        memmove(samples + count, samples + (size_t)i * SAMPLES_MAX, sizeof *samples * counts[i]);
        count += counts[i];
    }
    printf("{\"elapsed_ns\": %lld, \"count\": %llu, \"flushes\": %llu, ", (long long)elapsed, (unsigned long long)total,
           (unsigned long long)atomic_load(&log->open_batch));
    print_latencies(samples, count);
    printf("}\n");
}

/* ---- one way ----------------------------------------------------------------------------------------------------- */

typedef struct {
    sem_t wake, ready;
    _Alignas(128) _Atomic uint64_t sent;
    _Atomic int64_t stamp;
    _Alignas(128) _Atomic uint64_t received;
} one_way;

/* Keep this process on the first or second core it may use, if there are two. */
static void stay_on_core(int which) {
    cpu_set_t allowed, one;
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
        fail("sched_getaffinity");
    }
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && seen++ == which) {
            CPU_SET(cpu, &one);
            if (sched_setaffinity(0, sizeof one, &one) != 0) {
                fail("sched_setaffinity");
            }
        }
    }
}

/* RATE 0: ping-pong, the next stamp goes when the last has arrived. Else RATE stamps a second; the sender sleeps between. */
static void run_one_way(char **argument) {
    uint64_t rate = strtoull(argument[0], NULL, 10), count = strtoull(argument[1], NULL, 10);
    int spin = atoi(argument[2]), apart = atoi(argument[3]);
    one_way *way = shared(sizeof *way);
    int64_t *samples = shared(sizeof *samples * count);
    sem_init(&way->wake, 1, 0);
    sem_init(&way->ready, 1, 0);
    if (child() == 0) {
        if (apart) {
            stay_on_core(1);
        }
        for (uint64_t i = 0; i < count; i++) {
            if (spin) {
                while (atomic_load_explicit(&way->sent, memory_order_acquire) == i) {
                }
            } else {
                while (sem_wait(&way->wake) != 0) {
                }
            }
            samples[i] = now_ns() - atomic_load(&way->stamp);
            atomic_store_explicit(&way->received, i + 1, memory_order_release);
            if (!rate && !spin) {
                sem_post(&way->ready);
            }
        }
        _exit(0);
    }
    if (apart) {
        stay_on_core(0);
    }
    int64_t due = now_ns() + 10000000;
    for (uint64_t i = 0; i < count; i++) {
        if (rate) {
            sleep_until(due);
            due += 1000000000ll / (int64_t)rate;
        }
        while (rate && atomic_load_explicit(&way->received, memory_order_acquire) != i) {
        }
        atomic_store(&way->stamp, now_ns());
        atomic_store_explicit(&way->sent, i + 1, memory_order_release);
        if (!spin) {
            sem_post(&way->wake);
        }
        if (!rate && spin) {
            while (atomic_load_explicit(&way->received, memory_order_acquire) != i + 1) {
            }
        } else if (!rate) {
            while (sem_wait(&way->ready) != 0) {
            }
        }
    }
    wait(NULL);
    printf("{");
    print_latencies(samples, count);
    printf("}\n");
}

int main(int count, char **argument) {
    static const struct {
        const char *name;
        int arguments;
        void (*run)(char **);
    } floors[] = {
        {"append", 4, run_append},     {"prepare", 2, run_prepare}, {"write", 4, run_write},
        {"handover", 4, run_handover}, {"one_way", 4, run_one_way},
    };
    for (size_t i = 0; i < sizeof floors / sizeof *floors; i++) {
        if (count > 1 && strcmp(argument[1], floors[i].name) == 0 && count == floors[i].arguments + 2) {
            floors[i].run(argument + 2);
            return 0;
        }
    }
    fprintf(stderr, "usage: see the head of bench_floors.c\n");
    return 2;
}
