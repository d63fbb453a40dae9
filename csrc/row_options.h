// RowOptions as they cross from Python: ops/options.py's list of floats.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include "row_terms.h"

namespace scope_fast {

template <class T>
RowOptions<T> row_options(c10::ArrayRef<double> values) {
  TORCH_CHECK_VALUE(values.size() == 10, "options has ", values.size(), " values: expected RowOptions' 10");
  const auto at = [&](int i) { return static_cast<T>(values[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
}

}  // namespace scope_fast
