// The products of all pairs, tile by tile, for kernels that do something with each tile and keep none of them.
//
// A program has three warpgroups. One copies: a tile of 128 rows and 128 columns takes D / 64 steps, each a box of the
// columns' features and, where those of the rows do not fit into shared memory, one of the rows'. The other two take the
// tiles in turns, so that the one's arithmetic on its tile runs beside the other's products. Two programs, a cluster,
// take the tiles of two neighbouring row blocks at the same time: each copies half of the columns' features for both.
#pragma once

#include "hopper.cuh"

namespace fastclip {

constexpr int TILE = 128, STEP = 64;
constexpr int BOX_BYTES = TILE * STEP * 2;
constexpr int CLUSTER = 2;
constexpr int RESIDENT_STEPS = 8;  // rows of up to 512 dimensions stay in shared memory
constexpr int THREADS = 3 * 128;
constexpr float LOG2E = 1.4426950408889634f;
constexpr int COPIER_REGISTERS = 24, WORKER_REGISTERS = 240;

// The column of each row's own.
struct Labels {
  const int64_t* labels;  // may be null: row i's positive is column offset + i
  int offset, rows, columns;

  __device__ int of(int row) const {
    if (row >= rows) return -1;
    return (labels == nullptr ? row : static_cast<int>(labels[row])) + offset;
  }
};

// The rows and columns of one program of a grid of (programs, parts): row blocks first_block, first_block +
// block_stride, ..., the last of which may lie behind the rows, where only its neighbour's do not; columns
// [first_column, last_column).
struct Share {
  int first_block, block_stride, blocks;
  int first_column, last_column;
  int steps;  // of 64 dimensions

  __device__ Share(const Labels& labels, int columns_per_part, int steps)
      : first_block(blockIdx.x), block_stride(gridDim.x), blocks((labels.rows + TILE - 1) / TILE),
        first_column(blockIdx.y * columns_per_part), last_column(min(first_column + columns_per_part, labels.columns)),
        steps(steps) {}

  __device__ bool has(int block) const { return block / CLUSTER * CLUSTER < blocks; }
  __device__ int tiles() const { return (last_column - first_column + TILE - 1) / TILE; }
};

template <bool RESIDENT, int STAGES>
struct Pipeline {
  static constexpr int STAGE_BYTES = RESIDENT ? BOX_BYTES : 2 * BOX_BYTES;
  static constexpr int ROW_BYTES = RESIDENT ? RESIDENT_STEPS * BOX_BYTES : 0;
  static constexpr int BYTES = ROW_BYTES + STAGES * STAGE_BYTES;

  char* boxes;  // BYTES, at a multiple of 1024
  uint64_t* full;  // (STAGES) and so on
  uint64_t* empty;
  uint64_t* rows_full;
  uint64_t* rows_empty;
  uint64_t* turn;  // its phases are the tiles whose last step one of the warpgroups has met

  static constexpr int BARRIERS = 2 * STAGES + 3;

  __device__ Pipeline(char* memory, uint64_t* barriers)
      : boxes(memory), full(barriers), empty(barriers + STAGES), rows_full(barriers + 2 * STAGES),
        rows_empty(barriers + 2 * STAGES + 1), turn(barriers + 2 * STAGES + 2) {}

  __device__ char* row_box(int step) const { return boxes + step * BOX_BYTES; }
  __device__ char* stage(int index) const { return boxes + ROW_BYTES + index * STAGE_BYTES; }

  // By one thread, before the others use it.
  __device__ void init() const {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 4 * CLUSTER);  // the warps of the warpgroups that read it
    }
    barrier_init(rows_full, 1);
    barrier_init(rows_empty, 8);
    barrier_init(turn, 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // By one thread.
  __device__ void copy(const CUtensorMap* row_map, const CUtensorMap* column_map, const Share& share) const {
    int index = 0, sweep = 0;
    const int rank = blockIdx.x % CLUSTER;
    constexpr int PART = TILE / CLUSTER;
    for (int block = share.first_block; share.has(block); block += share.block_stride, sweep++) {
      if (RESIDENT) {
        barrier_wait(rows_empty, (sweep & 1) ^ 1);
        barrier_expect(rows_full, share.steps * BOX_BYTES);
        for (int step = 0; step < share.steps; step++) {
          load_box(row_box(step), row_map, block * TILE, step * STEP, rows_full);
        }
      }
      for (int column = share.first_column; column < share.last_column; column += TILE) {
        for (int step = 0; step < share.steps; step++, index++) {
          const int at = index % STAGES;
          barrier_wait(empty + at, ((index / STAGES) & 1) ^ 1);
          barrier_expect(full + at, STAGE_BYTES);
          load_box_to(stage(at) + rank * (BOX_BYTES / CLUSTER), column_map, column + rank * PART, step * STEP, full + at,
                      (1 << CLUSTER) - 1);
          if (!RESIDENT) load_box(stage(at) + BOX_BYTES, row_map, block * TILE, step * STEP, full + at);
        }
      }
    }
  }

  // The products of tile `tile` of sweep `sweep`, by one warpgroup: two blocks of 64 rows.
  // Tile by tile in order: who waits for a phase of a barrier must have seen that the one before it is over.
  template <typename T>
  __device__ __forceinline__ void multiply(float (&acc)[2][64], const Share& share, int sweep, int tile) const {
    const bool is_leader = threadIdx.x % 32 == 0;
    const int number = sweep * share.tiles() + tile;
    int index = number * share.steps;
    warpgroup_sync(threadIdx.x / 128);
    barrier_wait(turn, (number & 1) ^ 1);
    if (RESIDENT) barrier_wait(rows_full, sweep & 1);
    int before = 0;
    for (int step = 0; step < share.steps; step++, index++) {
      const int at = index % STAGES;
      barrier_wait(full + at, (index / STAGES) & 1);
      if (step == share.steps - 1 && is_leader) barrier_arrive(turn);
      const uint64_t columns = box_descriptor(stage(at));
      const char* row_boxes = RESIDENT ? row_box(step) : stage(at) + BOX_BYTES;
      const uint64_t upper = box_descriptor(row_boxes), lower = box_descriptor(row_boxes + BOX_BYTES / 2);
      products_begin();
#pragma unroll
      for (int k = 0; k < STEP / 16; k++) {
        const int keep = step > 0 || k > 0;
        product<T>(acc[0], upper + 2 * k, columns + 2 * k, keep);
        product<T>(acc[1], lower + 2 * k, columns + 2 * k, keep);
      }
      products_commit();
      if (step > 0) {
        products_wait<1>();
        if (is_leader) barrier_arrive_all(empty + before, CLUSTER);
      }
      before = at;
    }
    products_wait<0>();
    if (is_leader) barrier_arrive_all(empty + before, CLUSTER);
  }

  // This warp needs the sweep's rows no more; it may have had no tile of it.
  __device__ void leave_rows(int sweep) const {
    if (!RESIDENT) return;
    barrier_wait(rows_full, sweep & 1);
    if (threadIdx.x % 32 == 0) barrier_arrive(rows_empty);
  }
};

// Where a thread's part of a tile lies: rows row(0 .. 3), columns column(0 .. 31), as acc[row / 2][...] holds them.
struct Place {
  int warp, lane;

  __device__ Place() : warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

  __device__ int row(int r) const { return (r / 2) * 64 + warp * 16 + lane / 4 + (r % 2) * 8; }
  __device__ int column(int c) const { return c / 2 * 8 + lane % 4 * 2 + c % 2; }
};

// The element of row r and column c of a thread's part; both must be known when it is compiled.
__device__ __forceinline__ float& element(float (&acc)[2][64], int r, int c) {
  return acc[r / 2][c / 2 * 4 + r % 2 * 2 + c % 2];
}

// Whether a thread of this warp has something to mask.
__device__ __forceinline__ bool is_masked(const Place& place, int first_row, int column, const Labels& labels) {
  bool found = first_row + TILE > labels.rows || column + TILE > labels.columns;
  if (labels.labels == nullptr) {
    const int first = first_row + labels.offset;
    return found || (first < column + TILE && first + TILE > column);
  }
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const int label = labels.of(first_row + place.row(r));
    found |= label >= column && label < column + TILE;
  }
  return __any_sync(~0u, found);
}

// A warpgroup's way out: 64 rows of a tile as float16, through shared memory.
struct Store {
  static constexpr int BYTES = 64 * TILE * 2;  // two boxes of 64 x 64

  char* boxes;
  int warpgroup, half_warp, row;  // lanes 0-15 have the addresses of 8 columns' 16 rows, the others of the next 8

  __device__ Store(char* memory, int warpgroup, const Place& place)
      : boxes(memory), warpgroup(warpgroup), half_warp(place.lane / 16), row(place.warp * 16 + place.lane % 16) {}

  // d in a product's layout; (first_row, column) the first element. By all threads of the warpgroup.
  __device__ __forceinline__ void put(const float (&d)[64], const CUtensorMap* map, int first_row, int column) const {
    const bool is_first = threadIdx.x % 128 == 0;
    if (is_first) wait_stores_read();
    warpgroup_sync(warpgroup);
    const uint32_t start = shared_address(boxes) + row * 128;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const int chunk = (j % 8 + half_warp) ^ (row & 7);  // of 16 bytes, as the swizzle has them
      const float* x = d + 4 * j;
      store_matrices(start + j / 8 * (BYTES / 2) + chunk * 16, two_halves(x[0], x[1]), two_halves(x[2], x[3]),
                     two_halves(x[4], x[5]), two_halves(x[6], x[7]));
    }
    fence_before_copy();
    warpgroup_sync(warpgroup);
    if (is_first) {
      store_box(boxes, map, first_row, column);
      store_box(boxes + BYTES / 2, map, first_row, column + 64);
      commit_stores();
    }
  }

  __device__ void finish() const {
    if (threadIdx.x % 128 == 0) wait_stores();
  }
};

// Programs along the rows, a multiple of CLUSTER, and parts of the columns: no more than there are multiprocessors, and
// as evenly as whole tiles allow.
struct Grid {
  int programs, parts, columns_per_part;

  Grid(int rows, int columns, int processors) {
    const int pairs = ceil_div(ceil_div(rows, TILE), CLUSTER), most = processors / CLUSTER;
    programs = CLUSTER * ceil_div(pairs, ceil_div(pairs, most));
    const int tiles = ceil_div(columns, TILE);
    const int wanted = processors / programs;
    columns_per_part = TILE * ceil_div(tiles, wanted > 1 ? wanted : 1);
    parts = ceil_div(columns, columns_per_part);
  }

  static int ceil_div(int a, int b) { return (a + b - 1) / b; }
};

// On the host: 0, or the number of CUDA's error.
template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), const Grid& grid, int bytes, cudaStream_t stream,
          const Arguments&... arguments) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.programs, grid.parts);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace fastclip
