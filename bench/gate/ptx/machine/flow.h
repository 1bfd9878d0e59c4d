// Branches. Where lanes part, one part runs to where both ways meet, then the other.
#pragma once
#include "state.h"

namespace ptx {

// The lanes that run have come to where others join them, or have left: the next part goes on.
inline void next_part(Warp& w) {
  do {
    const Part p = w.parts.back();
    w.parts.pop_back();
    w.pc = p.pc;
    w.active = p.lanes & w.alive;
    w.joins = p.join;
  } while (!w.active || w.pc == w.joins);
}
inline Step branch(Warp& w, const Ins& i) {  // imm: where the two ways meet
  const u32 rest = w.active & ~w.m;
  if (!rest) {
    w.pc = i.target;
    return JUMP;
  }
  const int meet = int(i.imm[0]);
  // Who has come to the meeting point waits in the part below.
  if (meet != w.joins) w.parts.push_back({meet, w.active, w.joins});
  if (w.pc + 1 != meet && i.target != meet) w.parts.push_back({w.pc + 1, rest, meet});
  const bool here_first = i.target == meet;
  w.active = here_first ? rest : w.m;
  w.joins = meet;
  w.pc = here_first ? w.pc + 1 : i.target;
  return JUMP;
}
inline Step leave(Warp& w, const Ins&) {
  w.alive &= ~w.m;
  w.active &= ~w.m;
  if (!w.alive) return EXIT;
  return w.active ? NEXT : JUMP;  // without active lanes the next part takes over
}
inline Step trap(Warp&, const Ins&) { fail("trap: an assertion of the kernel failed"); }

inline void add_flow(Table& t) {
  t["bra"] = {branch, ""};
  t["ret"] = {leave, ""};
  t["trap"] = {trap, ""};
}

}  // namespace ptx
