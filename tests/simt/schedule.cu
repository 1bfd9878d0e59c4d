// The order of tiles of csrc/schedule.cuh, written out: (m, n) of every index and rank.
#include "device.cuh"
#include "schedule.cuh"

extern "C" int schedule(int* order, int64_t M, int64_t N, int tile_m, int tile_n, int cluster) {
  const fusedmlp::Schedule schedule(M, N, tile_m, tile_n, cluster);
  for (int index = 0; index < schedule.tiles(); ++index) {
    for (int rank = 0; rank < cluster; ++rank) {
      const fusedmlp::TileAt tile = schedule.at(index, rank);
      *order++ = tile.m;
      *order++ = tile.n;
    }
  }
  return 0;
}

extern "C" int tiles(int* count, int64_t M, int64_t N, int tile_m, int tile_n, int cluster) {
  *count = fusedmlp::Schedule(M, N, tile_m, tile_n, cluster).tiles();
  return 0;
}
