/* The same measurement as `unisono bench`, for any MPI: back-to-back calls in batches (1,000 calls below 4 KiB), f32 sum,
 * out of place; of each batch the slowest rank's time counts; percentiles over batches. Bytes are those each rank
 * contributes. One JSON line per size.
 *
 *   mpicc -O2 -o mpi_collectives mpi_collectives.c && mpirun -n 2 ./mpi_collectives [all_reduce|broadcast|all_gather ...]
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t SIZES[] = {8,         64,         512,        4 << 10, 16 << 10, 64 << 10,
                               256 << 10, 512 << 10,  4 << 20,    16 << 20, 64 << 20};

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void call(int operation, float *source, float *target, int count) {
    switch (operation) {
    case 0: MPI_Allreduce(source, target, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
    case 1: MPI_Bcast(source, count, MPI_FLOAT, 0, MPI_COMM_WORLD); break;
    default: MPI_Allgather(source, count, MPI_FLOAT, target, count, MPI_FLOAT, MPI_COMM_WORLD);
    }
}

static double batch_us(int operation, float *source, float *target, int count, int calls) {
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int i = 0; i < calls; i++) call(operation, source, target, count);
    return (MPI_Wtime() - start) * 1e6 / calls;
}

int main(int argc, char **argv) {
    static const char *NAMES[] = {"all_reduce", "broadcast", "all_gather"};
    int rank, ranks;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    for (int operation = 0; operation < 3; operation++) {
        int wanted = argc == 1;
        for (int i = 1; i < argc; i++) wanted |= strcmp(argv[i], NAMES[operation]) == 0;
        for (size_t s = 0; wanted && s < sizeof SIZES / sizeof *SIZES; s++) {
            size_t bytes = SIZES[s];
            int count = (int)(bytes / sizeof(float)), calls = bytes < 4096 ? 1000 : 1;
            float *source = malloc(bytes), *target = malloc(bytes * (operation == 2 ? ranks : 1));
            for (int i = 0; i < count; i++) source[i] = (float)(i % 1000 + rank);
            memset(target, 0, bytes * (operation == 2 ? ranks : 1));
            double once = 0;
            for (int i = 0; i < (bytes >= 1 << 20 ? 3 : 20); i++) once = batch_us(operation, source, target, count, calls);
            MPI_Allreduce(MPI_IN_PLACE, &once, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
            int rounds = (int)(250e3 / (once * calls));
            rounds = rounds < 10 ? 10 : rounds > 20000 ? 20000 : rounds;
            double *times = malloc(rounds * sizeof *times);
            for (int i = 0; i < rounds; i++) times[i] = batch_us(operation, source, target, count, calls);
            MPI_Allreduce(MPI_IN_PLACE, times, rounds, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
            qsort(times, rounds, sizeof *times, ascending);
            if (rank == 0) {
                printf("{\"operation\":\"%s\",\"bytes\":%zu,\"p50_us\":%.3f,\"p99_us\":%.3f,\"min_us\":%.3f}\n",
                       NAMES[operation], bytes, times[rounds / 2], times[rounds * 99 / 100], times[0]);
                fflush(stdout);
            }
            free(source), free(target), free(times);
        }
    }
    MPI_Finalize();
    return 0;
}
