import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

/** What a virtual machine of Java does with the processor: compiled code, implicit checks by faults, threads, garbage. */
public class Work {
    static class Node { Node next; int value; }
    interface Shape { double area(); }
    record Square(double side) implements Shape { public double area() { return side * side; } }
    record Circle(double radius) implements Shape { public double area() { return Math.PI * radius * radius; } }

    static int caught(Node[] nodes) {
        int n = 0;
        for (Node node : nodes) {
            try {
                n += node.value;
            } catch (NullPointerException e) { // a fault at address 0, once it is compiled
                n ^= 0x5A5A;
            }
        }
        return n;
    }
    static int deep(int n) { return n == 0 ? deep(1) + 1 : deep(n + 1) + 1; }

    public static void main(String[] words) throws Exception {
        Random random = new Random(7);
        Node[] nodes = new Node[2000];
        for (int i = 0; i < nodes.length; i++)
            if (i % 97 != 0) { nodes[i] = new Node(); nodes[i].value = random.nextInt(1000); }
        long sum = 0;
        for (int i = 0; i < 300; i++) sum = sum * 31 + caught(nodes);
        System.out.println("nulls " + sum);

        Map<String, List<Integer>> map = new TreeMap<>();
        for (int i = 0; i < 60000; i++) map.computeIfAbsent("k" + random.nextInt(500), k -> new ArrayList<>()).add(i);
        System.out.println("map " + map.entrySet().stream().mapToInt(e -> e.getKey().hashCode() * e.getValue().size()).sum());

        List<Shape> shapes = IntStream.range(0, 20000).mapToObj(i -> i % 3 == 0 ? new Circle(i) : (Shape) new Square(i)).toList();
        System.out.println("areas " + shapes.stream().mapToDouble(Shape::area).sum());

        ExecutorService pool = Executors.newFixedThreadPool(4);
        List<Future<Long>> parts = new ArrayList<>();
        for (int t = 0; t < 4; t++) {
            final int from = t;
            parts.add(pool.submit(() -> { long h = from; for (int i = 0; i < 400000; i++) h = h * 6364136223846793005L + i; return h; }));
        }
        long all = 0;
        for (Future<Long> part : parts) all ^= part.get();
        pool.shutdown();
        System.out.println("threads " + all);

        long garbage = 0;
        for (int i = 0; i < 3000; i++) { byte[] b = new byte[20000 + i]; b[i] = (byte) i; garbage += b[i] + b.length; }
        System.gc();
        System.out.println("garbage " + garbage);
        try {
            deep(1);
        } catch (StackOverflowError e) { // a fault at a guard page
            System.out.println("stack overflow");
        }
        StringBuilder text = new StringBuilder();
        for (int i = 0; i < 20000; i++) text.append(String.format("%x,", i * 2654435761L));
        System.out.println("text " + text.toString().hashCode());
    }
}
