/* The same measurement as `unisono bench`, for any MPI: back-to-back calls in batches (1,000 calls below 4 KiB), f32 sum,
 * out of place; of each batch the slowest rank's time counts; percentiles over batches. Bytes are those of one part: what
 * each rank contributes, or gets where it contributes a part to every rank. send_recv is a round trip between ranks 0 and
 * 1, 2 and 3, and so on. One JSON line per size.
 *
 *   mpicc -O2 -o mpi_collectives mpi_collectives.c
 *   mpirun -n 2 ./mpi_collectives [-t MILLISECONDS per size] [-s BYTES,BYTES…] [OPERATION…]
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum operation {
    ALL_REDUCE, BROADCAST, ALL_GATHER, REDUCE, REDUCE_SCATTER, GATHER, SCATTER, ALL_TO_ALL, SEND_RECV, BARRIER, OPERATIONS
};

/* The name of each, and whether its input and its output have a part for every rank (somewhere). */
static const struct {
    const char *name;
    int from_all, into_all;
} TABLE[OPERATIONS] = {
    [ALL_REDUCE] = {"all_reduce", 0, 0}, [BROADCAST] = {"broadcast", 0, 0},
    [ALL_GATHER] = {"all_gather", 0, 1}, [REDUCE] = {"reduce", 0, 0},
    [REDUCE_SCATTER] = {"reduce_scatter", 1, 0}, [GATHER] = {"gather", 0, 1},
    [SCATTER] = {"scatter", 1, 0}, [ALL_TO_ALL] = {"all_to_all", 1, 1},
    [SEND_RECV] = {"send_recv", 0, 0}, [BARRIER] = {"barrier", 0, 0},
};

static size_t sizes[64] = {8,         64,        512,     4 << 10,  16 << 10, 64 << 10,
                           256 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20};
static int size_count = 11, rank, ranks;
static double time_us = 250e3;

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* A message there and one back, between neighbours; a last rank without a partner has nothing to do. */
static void round_trip(float *source, float *target, int count) {
    int partner = rank ^ 1;
    if (partner >= ranks) return;
    if (rank < partner) {
        MPI_Send(source, count, MPI_FLOAT, partner, 0, MPI_COMM_WORLD);
        MPI_Recv(target, count, MPI_FLOAT, partner, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    } else {
        MPI_Recv(target, count, MPI_FLOAT, partner, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        MPI_Send(source, count, MPI_FLOAT, partner, 0, MPI_COMM_WORLD);
    }
}

static void call(enum operation operation, float *source, float *target, int count) {
    MPI_Comm world = MPI_COMM_WORLD;
    switch (operation) {
    case ALL_REDUCE: MPI_Allreduce(source, target, count, MPI_FLOAT, MPI_SUM, world); break;
    case BROADCAST: MPI_Bcast(source, count, MPI_FLOAT, 0, world); break;
    case ALL_GATHER: MPI_Allgather(source, count, MPI_FLOAT, target, count, MPI_FLOAT, world); break;
    case REDUCE: MPI_Reduce(source, target, count, MPI_FLOAT, MPI_SUM, 0, world); break;
    case REDUCE_SCATTER: MPI_Reduce_scatter_block(source, target, count, MPI_FLOAT, MPI_SUM, world); break;
    case GATHER: MPI_Gather(source, count, MPI_FLOAT, target, count, MPI_FLOAT, 0, world); break;
    case SCATTER: MPI_Scatter(source, count, MPI_FLOAT, target, count, MPI_FLOAT, 0, world); break;
    case ALL_TO_ALL: MPI_Alltoall(source, count, MPI_FLOAT, target, count, MPI_FLOAT, world); break;
    case SEND_RECV: round_trip(source, target, count); break;
    default: MPI_Barrier(world);
    }
}

static double batch_us(enum operation operation, float *source, float *target, int count, int calls) {
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int i = 0; i < calls; i++) call(operation, source, target, count);
    return (MPI_Wtime() - start) * 1e6 / calls;
}

static void measure(enum operation operation, size_t bytes) {
    int count = (int)(bytes / sizeof(float)), calls = bytes < 4096 ? 1000 : 1;
    size_t input = bytes * (TABLE[operation].from_all ? ranks : 1);
    size_t output = bytes * (TABLE[operation].into_all ? ranks : 1);
    float *source = malloc(input + 1), *target = malloc(output + 1);
    for (size_t i = 0; i < input / sizeof(float); i++) source[i] = (float)(i % 1000 + rank);
    memset(target, 0, output);
    double once = 0;
    for (int i = 0; i < (bytes >= 1 << 20 ? 3 : 20); i++) once = batch_us(operation, source, target, count, calls);
    MPI_Allreduce(MPI_IN_PLACE, &once, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    int rounds = (int)(time_us / (once * calls));
    rounds = rounds < 10 ? 10 : rounds > 20000 ? 20000 : rounds;
    double *times = malloc(rounds * sizeof *times);
    for (int i = 0; i < rounds; i++) times[i] = batch_us(operation, source, target, count, calls);
    MPI_Allreduce(MPI_IN_PLACE, times, rounds, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    qsort(times, rounds, sizeof *times, ascending);
    if (rank == 0) {
        printf("{\"operation\":\"%s\",\"bytes\":%zu,\"p50_us\":%.3f,\"p99_us\":%.3f,\"min_us\":%.3f}\n",
               TABLE[operation].name, bytes, times[rounds / 2], times[rounds * 99 / 100], times[0]);
        fflush(stdout);
    }
    free(source), free(target), free(times);
}

static void read_sizes(char *text) {
    size_count = 0;
    for (char *word = strtok(text, ","); word && size_count < 64; word = strtok(NULL, ","))
        sizes[size_count++] = strtoull(word, NULL, 10);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    int first = 1;
    for (; first + 1 < argc && argv[first][0] == '-'; first += 2) {
        if (argv[first][1] == 't') time_us = atof(argv[first + 1]) * 1e3;
        if (argv[first][1] == 's') read_sizes(argv[first + 1]);
    }
    for (int operation = 0; operation < OPERATIONS; operation++) {
        int wanted = first == argc;
        for (int i = first; i < argc; i++) wanted |= strcmp(argv[i], TABLE[operation].name) == 0;
        if (!wanted) continue;
        if (operation == BARRIER) {
            measure(operation, 0);
            continue;
        }
        for (int s = 0; s < size_count; s++) measure(operation, sizes[s]);
    }
    MPI_Finalize();
    return 0;
}
