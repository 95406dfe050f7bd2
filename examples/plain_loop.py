"""A plain PyTorch loop: three teachers to one network. `python examples/plain_loop.py [EPOCHS]`"""

import sys

import torch
from digits import accuracy, digits, small_network, trained
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import ensdistill

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
train, test = digits()
teachers = [trained(small_network(seed), train, epochs) for seed in range(3)]

# all batches are of one size: drop_last
loader = DataLoader(train, batch_size=50, shuffle=True, drop_last=True)
distiller = ensdistill.Distiller(
    teachers,
    small_network(seed=3),
    method="latentbe+tdiv-sdiv",
    steps=epochs * len(loader),
    lr=0.05,
    device="cpu",
)
for epoch in range(epochs):
    for images, labels in loader:
        measures = distiller.step(images, labels)
    print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value.item():.4f}" for name, value in measures.items()))
    torch.save(distiller.state_dict(), "distiller.pt")  # load_state_dict goes on from here, to the same numbers

network = distiller.average()  # a plain nn.Sequential, with the names of small_network's tensors
for t, teacher in enumerate(teachers):
    print(f"teacher {t}: {accuracy(teacher, test):.3f} of the test images")
print(f"student: {accuracy(network, test):.3f}")
save_file(network.state_dict(), "student.safetensors")
