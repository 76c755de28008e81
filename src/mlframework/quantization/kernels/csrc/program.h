// A program: operators on codes in a row, which one call runs. int8/program.py makes it from the modules of a model.
#pragma once

#include <string>
#include <vector>

#include "tensors.h"

namespace kernels {

struct Instruction {
  // Computes a value from others, which `inputs` point to.
  using Function = Tensor (*)(const Instruction& instruction, const std::vector<const Tensor*>& inputs);

  Function function;
  std::vector<int64_t> inputs;   // numbers of values: those that the program is given, then one for each instruction
  std::vector<Tensor> tensors;   // constants, in the order that `function` reads them
  std::vector<int64_t> numbers;  // likewise
  std::vector<int64_t> unread;   // values that no later instruction reads
};

// Has an instruction compute what the name says, of the inputs, tensors and numbers that it has.
void set_function(Instruction& instruction, const std::string& name);

}  // namespace kernels
