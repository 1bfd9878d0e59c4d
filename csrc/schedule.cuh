// Which tiles a persistent block computes, and in which order.
#pragma once

#include <cstdint>

#include "activations.cuh"

namespace fusedmlp {

struct TileAt {
  int m, n;  // in tiles
};

// Tiles are handed out to whole clusters: `cluster` blocks take adjacent rows of one column and so
// share its weight tile. `kGroupRows` rows of tiles are walked together, rows fastest, so that the
// weights' and the tokens' tiles of one wave both stay in L2.
struct Schedule {
  static constexpr int kGroupRows = 16;

  int rows = 0, columns = 0;  // cluster rows, columns of tiles
  int cluster = 1;

  Schedule() = default;

  FUSEDMLP_FN static int ceil_div(int64_t a, int b) { return static_cast<int>((a + b - 1) / b); }

  FUSEDMLP_FN Schedule(int64_t M, int64_t N, int tile_m, int tile_n, int cluster_size)
      : rows(ceil_div(ceil_div(M, tile_m), cluster_size)),
        columns(ceil_div(N, tile_n)),
        cluster(cluster_size) {}

  // Cluster tiles in all.
  FUSEDMLP_FN int tiles() const { return rows * columns; }

  FUSEDMLP_FN TileAt at(int index, int rank) const {
    const int in_group = kGroupRows / cluster;
    const int per_group = in_group * columns;
    const int group = index / per_group;
    const int first = group * in_group;
    const int height = rows - first < in_group ? rows - first : in_group;
    const int within = index - group * per_group;
    return {(first + within % height) * cluster + rank, within / height};
  }
};

}  // namespace fusedmlp
